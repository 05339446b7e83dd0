"""What leaves for other programs is what the trace holds."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import CONFIGS, model, tokens
from test_trace import recorded

from nanokv.edits import Cut
from nanokv.errors import MissingExtraError, TraceError
from nanokv.trace import Recorder, Trace, export
from nanokv.trace.explain import diff
from nanokv.trace.schema import KINDS, ROLES, SITES


def written() -> Trace:
    """A trace with everything in it: three calls, a sampled token, an edit."""
    small, ids, recorder = model(CONFIGS["gemma3"]), tokens(CONFIGS["gemma3"], 9), Recorder(level="states")
    cache = small.new_cache()
    small.forward(ids[:6], cache, observer=recorder)
    recorder.turn("model", sampled=True)
    small.forward(ids[6:7], cache, observer=recorder, edits=[Cut(1, 6, 4)])
    recorder.turn("tool")
    small.forward(ids[7:], cache, observer=recorder)
    return recorder.trace


def collected(trace: Trace, table: str, rows: int) -> dict[str, np.ndarray]:
    parts = list(export.batches(trace, table, rows))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("rows", [1, 7, 1 << 19])
@pytest.mark.parametrize("table", ["tokens", "writes", "reads", "edits"])
def test_batches_together_are_the_table_however_large_they_are(table: str, rows: int) -> None:
    trace = written()
    whole, ours = getattr(trace, table), collected(trace, table, rows)
    for name in whole:
        theirs = whole[name]
        mine = np.array(ROLES, object)[ours[name]] if name == "role" and table == "tokens" else ours[name]
        assert np.array_equal(mine, theirs), name


def test_batches_are_no_larger_than_asked_for_but_for_what_belongs_together() -> None:
    trace, config = written(), CONFIGS["gemma3"]
    assert max(len(batch["dst"]) for batch in export.batches(trace, "reads", rows=10)) < 10 + 10
    assert max(len(batch["pos"]) for batch in export.batches(trace, "logits", rows=2 * config.vocab_size)) <= 9


def test_states_heads_and_logits_are_tables_too() -> None:
    trace = written()
    states, heads, logits = (collected(trace, table, 50) for table in ("states", "heads", "logits"))
    for i in range(0, len(states["pos"]), 7):
        name = f"layer{states['layer'][i]}.pos{states['pos'][i]}.{SITES[states['site'][i]]}"
        assert np.array_equal(states["value"][i], trace[name])
    for i in range(0, len(heads["pos"]), 5):
        name = f"layer{heads['layer'][i]}.pos{heads['pos'][i]}.head{heads['head'][i]}"
        assert np.array_equal(heads["q"][i], trace[f"{name}.q"]) and np.array_equal(heads["z"][i], trace[f"{name}.z"])
    assert logits["pos"].tolist() == list(range(9))
    for pos in range(9):
        assert np.array_equal(logits["logits"][pos], trace[f"pos{pos}.logits"])
        assert logits["final_scale"][pos] == trace[f"pos{pos}.final_scale"]


@pytest.mark.parametrize("level, tables", [("writes", 4), ("weights", 4), ("vectors", 5), ("states", 7)])
def test_a_level_has_the_tables_that_it_holds(level: str, tables: int) -> None:
    trace = recorded(level=level)[1]
    assert len(export.tables_of(trace)) == tables
    for table in export.tables_of(trace):
        assert list(export.batches(trace, table))
    with pytest.raises(TraceError, match="there is no table 'magic' in a trace of level"):
        list(export.batches(trace, "magic"))


def test_topk_exports_what_it_kept() -> None:
    small, recorder = model(CONFIGS["llama"]), Recorder(level="vectors", topk=2)
    small.forward(tokens(CONFIGS["llama"], 9), observer=recorder)
    trace = recorder.trace
    ours = collected(trace, "reads", 11)
    assert all(np.array_equal(ours[name], trace.reads[name]) for name in trace.reads)


def test_duckdb_answers_questions_of_the_parquet_files(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="writing Parquet needs pip install -e '.[test-parquet]'")
    duckdb = pytest.importorskip("duckdb", reason="asking of it needs pip install -e '.[test-parquet]'")
    trace, folder = written(), tmp_path / "run.parquet"
    files = export.parquet(trace, folder)
    assert [path.name for path in files] == [f"{table}.parquet" for table in export.LEVELS]

    def ask(question: str) -> list[tuple[Any, ...]]:
        return duckdb.sql(question.format(folder)).fetchall()  # type: ignore[no-any-return]

    reads = trace.reads
    (count,) = ask("SELECT count(*), sum(weight) FROM '{}/reads.parquet'")
    assert count[0] == len(reads["dst"]) and count[1] == pytest.approx(reads["weight"].sum(), rel=1e-5)
    past = ask("SELECT kind, count(*) FROM '{}/reads.parquet' GROUP BY kind ORDER BY kind")
    assert past == sorted((kind, int((reads["kind"] == i).sum())) for i, kind in enumerate(KINDS))
    strongest = ask("""SELECT r.layer, r.head, d.text, s.text, r.weight FROM '{0}/reads.parquet' r
                       JOIN '{0}/tokens.parquet' d ON d.pos = r.dst JOIN '{0}/tokens.parquet' s ON s.pos = r.src
                       WHERE r.src < r.dst ORDER BY r.weight DESC LIMIT 1""")[0]
    best = int(np.argmax(np.where(reads["src"] < reads["dst"], reads["weight"], -1)))
    texts = trace.tokens["text"]
    assert strongest[:4] == (reads["layer"][best], reads["head"][best], texts[reads["dst"][best]], texts[reads["src"][best]])
    assert np.float32(strongest[4]) == reads["weight"][best]
    (key,) = ask("SELECT k, k_hash, role FROM '{}/writes.parquet' WHERE layer = 2 AND pos = 6 AND kv_head = 1")
    assert np.array_equal(np.array(key[0], np.float32), trace["layer2.pos6.k"][1]) and key[2] == "model"
    assert key[1] == int(trace.steps[1].arrays["k_hash"][2, 0, 1])
    (state,) = ask("SELECT value FROM '{}/states.parquet' WHERE layer = 1 AND pos = 8 AND site = 'mlp_out'")
    assert np.array_equal(np.array(state[0], np.float32), trace["layer1.pos8.mlp_out"])
    assert ask("SELECT kind, site, layer, pos, src FROM '{}/edits.parquet'") == [("cut", "pattern", 1, 6, 4)]
    with pytest.raises(TraceError, match="already there"):
        export.parquet(trace, folder)


def test_json_lines_are_the_rows(tmp_path: Path) -> None:
    trace = written()
    rows = [json.loads(line) for line in export.json_lines(trace, tmp_path / "run.jsonl").read_text().splitlines()]
    reads = [row for row in rows if row["table"] == "reads"]
    assert len(reads) == len(trace.reads["dst"])
    assert [row["kind"] for row in reads] == [KINDS[kind] for kind in trace.reads["kind"]]
    assert np.array_equal(np.array([row["weight"] for row in reads], np.float32), trace.reads["weight"])
    cut = [row["score"] for row in reads if (row["layer"], row["dst"], row["src"]) == (1, 6, 4)]
    assert cut == [None] * CONFIGS["gemma3"].n_heads  # -inf is no number of JSON's
    first = next(row for row in rows if row["table"] == "writes")
    assert int(first["k_hash"], 16) == trace.writes["k_hash"][0] and len(first["k"]) == 6
    assert [row["text"] for row in rows if row["table"] == "tokens"] == list(trace.tokens["text"])
    assert {row["table"] for row in rows} == set(export.LEVELS)


def test_any_text_of_a_token_survives(tmp_path: Path) -> None:
    from nanokv.handmade import induction

    handmade, recorder = induction(32, 32), Recorder(level="weights")
    handmade.forward(handmade.tokenizer.encode('a"b \\n \u2028 \x01 \U0001f600 \u202e </script>'), observer=recorder)
    rows = [json.loads(line) for line in export.json_lines(recorder.trace, tmp_path / "a.jsonl", ["tokens"]).open(newline="\n")]
    assert [row["text"] for row in rows] == list(recorder.trace.tokens["text"])


def test_a_dump_of_a_trace_is_equal_to_it(tmp_path: Path) -> None:
    trace = written()
    found = diff(trace, export.dump(trace, tmp_path / "run.dump"))
    assert found.equal and found.extent == f"of {3 * (4 * 11 + 2)} ids"
    some = export.dump(trace, tmp_path / "some.dump", ["pattern", "logits"])
    assert {json.loads(line)["id"].rpartition(".")[2] for line in some.read_text().splitlines()} == {"pattern", "logits"}
    with pytest.raises(TraceError, match="does not hold 'gate'"):
        export.dump(trace, tmp_path / "other.dump", ["gate"])


def test_networkx_gets_the_flow(tmp_path: Path) -> None:
    networkx = pytest.importorskip("networkx", reason="needs pip install -e '.[networkx]'")
    flow = written().flow(measure="attention", heads="merged")
    graph = export.to_networkx(flow)
    assert graph.number_of_edges() == len(flow.edges)
    attention = [data for _, _, data in graph.edges(data=True) if data["kind"] == "attention"]
    assert sum(data["weight"] for data in attention) == pytest.approx(
        flow.edges["weight"][flow.edges["kind"] == 0].sum(), rel=1e-5
    )
    assert networkx.has_path(graph, "layer0.pos0", f"layer4.pos{flow.at}")
    assert graph.nodes["layer2.pos5"] == {"layer": 2, "pos": 5, "text": flow.tokens.text[5]}
    assert graph.has_edge("layer4.pos5", "layer0.pos6")  # position 6 was drawn from the prediction at 5
    networkx.write_graphml(graph, tmp_path / "flow.graphml")


def test_bertviz_gets_attention_layer_by_layer_and_the_tokens() -> None:
    trace = written()
    attention, texts = export.to_bertviz(trace)
    assert [a.shape for a in attention] == [(1, 6, 9, 9)] * 4 and all(a.dtype == np.float32 for a in attention)
    assert np.array_equal(attention[2][0], trace.pattern(2)) and texts == list(trace.tokens["text"])


@pytest.mark.parametrize("package, extra", [("pyarrow", "parquet"), ("networkx", "networkx")])
def test_without_its_package_an_export_names_the_extra(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **named)

    trace = written()
    flow = trace.flow(measure="attention")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=rf"nanokv\[{extra}\]"):
        export.parquet(trace, tmp_path / "a") if package == "pyarrow" else export.to_networkx(flow)
