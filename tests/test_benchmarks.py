"""The benchmark: how it orders, compares and tells what it measures, and one run of it that is tiny."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks import models, report, run
from benchmarks.goals import goals
from benchmarks.peers.drawing import graph
from benchmarks.plan import MEASURES, Plan, chosen, order, peers
from benchmarks.ratios import Sample, growth, races, spread
from benchmarks.results import Drawn, Fresh, Recording, Results
from benchmarks.workers import SLOWS_OPENBLAS, PeerError, Worker, environment
from nanokv import ops
from nanokv.config import Rope
from nanokv.gguf_file import open_gguf
from nanokv.trace.draw import find_program

CHECKPOINT = Path(__file__).parent / "checkpoints" / "llama"
OWN, LLAMA = "nanokv float32", "llama.cpp F32"


def sample(peer: str, seconds: float, number: int = 0, measure: str = "decode@16") -> Sample:
    return Sample(number, measure, "float32", peer, [seconds])


def made_up(**more: object) -> Results:
    plan = Plan(rounds=1, contexts=(16, 2048))
    empty = Results("2026-01-01", "run.py", plan, "a model", "Q4_1", 1000, {"float32": 4000}, {"cores": "2"}, {"numpy": "2"})
    return dataclasses.replace(empty, **more)


def test_the_reference_is_measured_between_every_two_and_the_rest_take_turns() -> None:
    assert order(["a", "b", "c"], "n", 0) == ["n", "a", "n", "b", "n", "c", "n"]
    assert order(["a", "b", "c"], "n", 4) == ["n", "b", "n", "c", "n", "a", "n"]
    assert order(["a", "b"], None, 1) == ["b", "a"]
    assert order([], "n", 1) == ["n"] and order([], None, 1) == []


def test_a_ratio_is_to_the_neighbours_in_the_same_round() -> None:
    taken = [sample(OWN, 1.0), sample(LLAMA, 3.0), sample(OWN, 2.0), sample("NumPy", 9.0), sample(OWN, 4.0),
             sample(OWN, 10.0, 1), sample(LLAMA, 5.0, 1)]  # fmt: skip
    assert races(taken, "decode@16", OWN, LLAMA) == [2.0, 0.5]
    assert races(taken, "decode@16", OWN, "NumPy") == [3.0]
    assert races(taken, "decode@256", OWN, LLAMA) == races(taken, "decode@16", "nobody", LLAMA) == []


def test_growth_is_taken_round_by_round() -> None:
    taken = [sample(OWN, 1.0), sample(OWN, 3.0), sample(OWN, 3.0, 0, "decode@2048"), sample(OWN, 1.0, 1)]
    assert growth(taken, OWN, "decode@16", "decode@2048") == [1.5]


def test_the_median_and_the_range() -> None:
    assert spread([]) is None
    found = spread([3.0, 1.0, 2.5])
    assert found is not None and (found.median, found.low, found.high, found.n) == (2.5, 1.0, 3.0, 3)
    assert report.shown(found) == "2.50 (1.00–3.00)" and report.shown(spread([0.001]), 0, 1e3) == "1"
    assert report.shown(None) == ""


def test_only_takes_measures_and_parts_of_names() -> None:
    everybody = peers("Q4_1")
    assert chosen(everybody, []) == (everybody, MEASURES)
    kept, measures = chosen(everybody, ["llama", "q8_0", "decode"])
    assert measures == ("decode",) and "read Q8_0" in {peer.name for peer in kept} and OWN not in {peer.name for peer in kept}
    with pytest.raises(ValueError, match="nobody is called 'vllm'"):
        chosen(everybody, ["vllm"])


def test_every_goal_is_about_peers_that_there_are() -> None:
    names = {peer.name for peer in peers("Q4_1")}
    own = {"itself at context 16", "unrecorded", ""}
    assert {goal.compared for goal in goals()} - own <= names
    assert len({(goal.what, goal.compared) for goal in goals()}) == len(goals())
    assert [peer.name for peer in peers("") if peer.group == "Q4_1"] == []


def test_the_page_says_whether_a_goal_is_met() -> None:
    results = made_up(samples=[sample(OWN, 1.0), sample(LLAMA, 1.4), sample(OWN, 1.0), sample("transformers", 4.2)],
                      fresh=[Fresh("nanokv Q4_1", 0.1, 1.0, 0.5, 10**8, 3 * 10**8)],
                      recordings=[Recording(0, OWN, "prefill", 1.0, 1.2, 100, 0.1)],
                      drawings=[Drawn(0, "target@256", {"flow": 4.0, "picture": 0.5}, 10**9),
                                Drawn(0, "proximity@1024", {"flow": 60.0}, 3 * 10**9),
                                Drawn(0, "dot@30000", {"dot": 120.0}, 0, ended=False)])  # fmt: skip
    page = report.markdown(results)
    assert "| picture of 256 tokens by target, from the trace |  | at most 5 s | 4.50 | met |" in page
    assert "| picture of 1,024 tokens by proximity, peak memory |  | at most 2000 MB | 3000 | **not met** |" in page
    assert "| graph of 30 × 200 states and 30,000 edges, unpruned |  | at most 2 s |  | not measured |" in page
    assert "| 30000 edges, by dot | more than 120 |  |  |" in page
    assert "| 256 tokens, by target | 4.50 | flow 4.00, picture 0.50 | 1000 |" in page
    assert f"| float32 decode, context 16 | {LLAMA} | at least 1.5 × | 1.40 | **not met** |" in page
    assert "| float32 decode, context 16 | transformers | at least 4 × | 4.20 | met |" in page
    assert "| packed Q4_1 peak memory, context 512 |  | at most 350 MB | 300 | met |" in page
    assert "| prefill recorded to disk, level weights | unrecorded | at most 1.15 × | 1.20 | **not met** |" in page
    assert "| float32 prefill of 512 | transformers | at least 1.2 × |  | not measured |" in page


def test_a_peer_that_is_absent_is_skipped_by_its_name() -> None:
    results = made_up(about={OWN: ""}, skipped={LLAMA: "No module named 'llama_cpp'"}, samples=[sample(OWN, 0.01)])
    page = report.markdown(results)
    assert f"| {LLAMA} | skipped: No module named 'llama_cpp' |  |  |" in page
    assert f"| {OWN} | 10.00 |  |  |" in page
    assert f"- {LLAMA}: skipped: No module named 'llama_cpp'" in page


def test_a_table_keeps_its_columns_whatever_a_cell_says() -> None:
    assert report.table(("a", "b"), [("x|y", "z")]) == ["| a | b |", "|---|---|", "| x\\|y | z |"]
    assert report.table(("a",), []) == []


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = made_up(samples=[sample(OWN, 1 / 3)], fresh=[Fresh(OWN, 0.1, 1.0, 0.5, 1, 2)], notes=["a note"],
                      recordings=[Recording(0, OWN, "decode", 1.0, 1.2, 100)],
                      drawings=[Drawn(0, "graph@30000", {"layout": 0.5}, 3)])  # fmt: skip
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again == dataclasses.replace(results, samples=[sample(OWN, 0.333333)])


def test_variables_that_slow_openblas_are_taken_from_numpy_alone() -> None:
    given = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "1", "OMP_NUM_THREADS": "7", "PYTHONPATH": "p", "HOME": "h"}
    kept, without = environment(given, 2), environment(given, 2, SLOWS_OPENBLAS)
    assert kept["OPENBLAS_CORETYPE"] == "Haswell" and kept["OMP_NUM_THREADS"] == "2" and kept["PYTHONPATH"].endswith(":p")
    assert kept.keys() - without.keys() == set(SLOWS_OPENBLAS)


def test_a_worker_that_cannot_load_says_why_and_one_that_dies_is_noticed(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "log", threads=1)
    try:
        with pytest.raises(PeerError, match="No module named"):
            worker.ask("load", {"program": "no_such_program.Model", "settings": {}})
        assert worker.ask("peak_memory") > 1e6
        worker.process.kill()
        with pytest.raises(PeerError, match="ended with status -9"):
            worker.ask("peak_memory")
    finally:
        worker.stop()


def test_rows_for_halves_give_the_scores_that_neighbours_gave() -> None:
    wq, wk, x = (np.random.default_rng(seed).standard_normal(shape) for seed, shape in enumerate([(16, 6), (16, 6), (3, 6)]))
    cos, sin = ops.rope_table(Rope(100.0), 8, 0, 3, np.dtype(float))

    def scores(wq: np.ndarray, wk: np.ndarray, pairs: str) -> np.ndarray:
        q, k = (ops.rope((x @ w.T).reshape(3, 2, 8), cos, sin, pairs) for w in (wq, wk))
        return np.einsum("ihd,jhd->hij", q, k)

    expected = scores(wq, wk, "neighbours")
    assert np.allclose(scores(models.halves(wq, 8), models.halves(wk, 8), "halves"), expected)
    assert not np.allclose(scores(wq, wk, "halves"), expected)


@pytest.mark.parametrize(("kind", "error"), [("F32", 0.0), ("Q8_0", 0.02)])
def test_a_gguf_file_is_made_anew_in_another_kind(tmp_path: Path, kind: str, error: float) -> None:
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "given.gguf", "llama")
    writer.add_block_count(7)
    writer.add_token_list(["a", "b"])
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("matrix", gguf.quants.quantize(values, q4_1), raw_dtype=q4_1)
    writer.add_tensor("vector", values[0])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    models.write_gguf(tmp_path / "given.gguf", tmp_path / "made.gguf", kind)
    given, made = open_gguf(tmp_path / "given.gguf"), open_gguf(tmp_path / "made.gguf")
    assert made.tensors["matrix"].kind == kind and made.tensors["vector"].kind == "F32"
    for name in given.tensors:
        assert np.abs(np.asarray(made.tensors[name]) - np.asarray(given.tensors[name])).max() <= error
    assert {key: made.pairs[key] for key in given.pairs if key != "general.file_type"} == given.pairs


def test_a_tiny_run_measures_everything_and_names_who_is_skipped(tmp_path: Path) -> None:
    sizes = ["--rounds=2", "--contexts=4,8", "--tokens=2", "--prefill=8", "--recorded-tokens=4", "--error-tokens=8"]
    asked = ["--only", "nanokv", "read", "numpy", "llama", "--model", str(CHECKPOINT), "--output", str(tmp_path)]
    assert run.main([*asked, *sizes, "--fresh=1"]) == 0
    results, page = Results.load(tmp_path / "results.json"), (tmp_path / "RESULTS.md").read_text()
    assert len(races(results.samples, "decode@8", OWN, "NumPy")) == len(races(results.samples, "prefill@8", OWN, "NumPy")) == 2
    assert all(0 < results.errors[name]["max"] < 1e-4 for name in (OWN, "NumPy"))
    assert {each.what for each in results.recordings} == {"prefill", "decode"} and results.fresh
    assert LLAMA in results.skipped and f"| {LLAMA} | skipped:" in page
    assert (tmp_path / "results.svg").exists() == (importlib.util.find_spec("matplotlib") is not None)


@pytest.mark.skipif(find_program() is None, reason="no program to draw with: pip install -e '.[dot]'")
def test_pictures_can_be_measured_alone(tmp_path: Path) -> None:
    sizes = ["--drawn=6", "--drawn-long=8", "--drawn-edges=6100", "--dot-seconds=0.01", "--fresh=1"]
    assert run.main(["--only", "drawing", "--model", str(CHECKPOINT), "--output", str(tmp_path), *sizes]) == 0
    results = Results.load(tmp_path / "results.json")
    assert [each.what for each in results.drawings] == ["target@6", "target@8", "proximity@8", "graph@6100", "dot@6100"]
    assert all(each.whole > 0 and each.peak_bytes > 1e7 for each in results.drawings[:4]) and not results.samples
    dot = results.drawings[4]
    assert not dot.ended and "by dot | more than 0.01 |" in (tmp_path / "RESULTS.md").read_text()


def test_the_large_graph_has_as_many_states_and_edges_as_it_says() -> None:
    made = graph(3, 10, 200)
    assert len(made.edges) == 200 and int(made.crossing.sum()) == 170
    assert (made.edges["src"][made.crossing] < made.edges["dst"][made.crossing]).all() and made.states.shape == (4, 10)
    with pytest.raises(ValueError, match="30 of the stream"):
        graph(3, 10, 30)
