"""The comparison of methods, with its commands run in this process on tiny models."""

import contextlib
import json
import sys
from pathlib import Path

import pytest

import evaluate
import train
from captioner import cli
from captioner.errors import UserError
from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
import compare_methods  # noqa: E402


@pytest.fixture
def in_process(monkeypatch) -> list[str]:
    """Commands run here; the list of those that did."""
    done = []

    def command(script, arguments, result):
        if not result.is_file():
            words = [str(word) for word in arguments]
            done.append(f"{script} {words[-1]}")
            assert {"train.py": train, "evaluate.py": evaluate}[script].main([*words, "--json", str(result)]) == 0
        return json.loads(result.read_text())

    class OneByOne(contextlib.nullcontext):
        """An executor that uses no thread, since only the main one can handle signals."""

        map = staticmethod(map)

        def __enter__(self):
            return self

    monkeypatch.setattr(compare_methods, "command", command)
    monkeypatch.setattr(compare_methods, "ThreadPoolExecutor", OneByOne)
    return done


def test_every_method_there_and_back(trained, tiny_data, tmp_path, in_process, capsys):
    pytest.importorskip("bitsandbytes")
    flags = [str(trained), "--new-data", str(tiny_data), "--seeds", "1", "--steps", "2", "--images", "4", "--batch-size", "2", "--new-images", "2", "--old-images", "2"]
    flags += ["--cost-steps", "2", "--jobs", "1", "--cache-features", str(tmp_path / "features"), "--output", str(tmp_path / "methods"), "--json", "-"]
    assert compare_methods.main([*flags, "--method", "soft prompt"]) == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert list(costs) == ["soft prompt"] and all(cost["step_seconds"] > 0 and cost["peak_memory_bytes"] > 1e7 for cost in costs["soft prompt"])
    flags.append("--no-cost")
    assert compare_methods.main(flags) == 0
    results = json.loads(capsys.readouterr().out)
    assert {result["method"] for result in results["results"]} == compare_methods.METHODS.keys()
    trainable = {result["method"]: result["trainable"] for result in results["results"]}
    assert trainable["bridge alone"] < trainable["LoRA attn"] < trainable["LoRA attn,ffn"] == trainable["QLoRA attn,ffn"]
    assert trainable["adapters + prompt"] - trainable["adapters"] == trainable["soft prompt"] - trainable["bridge alone"] > 0
    for result in results["results"]:
        assert all(0 <= result[phase][pictures] for phase in ("adapted", "back") for pictures in ("new", "old"))
    off = next(result for result in results["results"] if "switched_off" in result)
    assert off["switched_off"] == pytest.approx(results["before"]["old"]), "an adapter that is off leaves the captioner as it was"
    table = (tmp_path / "methods" / "table.md").read_text()
    assert table.count("\n") == 3 + len(compare_methods.METHODS)
    done = len(in_process)
    assert compare_methods.main(flags) == 0 and len(in_process) == done, "what is finished is not run again"


def test_spread():
    assert compare_methods.spread([0.5]) == "0.500" and compare_methods.spread([0.1, 0.2, 0.3]) == "0.200 (0.100–0.300)"


def test_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no method 'magic': choose from bridge alone"):
        compare_methods.main(["--method", "magic"])
    with pytest.raises(UserError, match=r"runs/flickr8k/config.json: no such file"):
        compare_methods.main([])
    with pytest.raises(UserError, match="train.py.*exit code 2: .*--nonsense"):
        compare_methods.command("train.py", ["--nonsense"], Path("result.json"))
    assert cli.parse_settings(compare_methods.Settings, ["--method", "adapters", "--method", "soft prompt"], "").method == ("adapters", "soft prompt")
