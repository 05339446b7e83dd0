"""Recording a forward pass and drawing it: the package `nanokv.trace`, whose modules lie in the folder `trace/`.

A top-level package `trace` would hide, or be hidden by, Python's standard module of that name. So the folder has no
`__init__.py`, and this module stands in for it: it makes itself a package whose submodules are found there.
"""

from pathlib import Path

# Installed from a wheel, the folder lies beside this file as nanokv/trace; in the repository it is ../trace.
_installed = Path(__file__).with_suffix("")
__path__ = [str(_installed if _installed.is_dir() else _installed.parents[1] / "trace")]
__package__ = __name__
if __spec__ is not None:
    __spec__.submodule_search_locations = __path__

# Only now can the submodules be found, hence imports that are not at the top of the file.
from nanokv.trace.flow import Flow
from nanokv.trace.recorder import Recorder
from nanokv.trace.store import Trace

__all__ = ["Flow", "Recorder", "Trace"]
