"""The command over all benchmarks: which rows run, what is an error, and what the scripts share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"
FAKE = """
import common

IDS = ("A1", "A2", "A3")
CUDA_IDS = ("A3",)


def run(only=None):
    if "A2" in only:
        raise RuntimeError("the two sides disagree\\nin detail")
    if "A3" in only:
        raise RuntimeError("A3 needs a CUDA device")
    return [common.row("A1", "what", ours=[1.0, 1.0, 2.0], theirs=[2.0, 3.0, 2.0], peer="a peer", peer_version="1", must=2.5, dtype="fp32 vs fp32")]
"""
OTHER = """
import common

IDS = ("B1",)


def run():
    return [common.row("B1", "what", ours=[1.0], theirs=[4.0], peer="a peer", peer_version="1", must=3.0, dtype="fp32 vs fp32")]
"""


@pytest.fixture
def bench(tmp_path):
    """A folder with all.py, common.py and two benchmarks, as a command."""
    for name in ("all.py", "common.py"):
        (tmp_path / name).write_text((BENCH / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "fake.py").write_text(FAKE, encoding="utf-8")
    (tmp_path / "other.py").write_text(OTHER, encoding="utf-8")
    # Whether there is a GPU is all that this command asks torch.
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n", encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(tmp_path / "all.py"), *arguments], capture_output=True, text=True)

    return run


def test_rows_that_need_a_gpu_are_left_out_and_failures_are_named(bench):
    done = bench("--json", "-")
    assert done.returncode == 1
    assert [row["id"] for row in json.loads(done.stdout)["rows"]] == ["A1", "B1"]
    assert done.stderr.count("error:") == 1
    assert "error: A2 was not measured: RuntimeError: the two sides disagree\n" in done.stderr
    assert "A3" not in done.stderr


def test_a_bad_row_takes_no_other_with_it_and_every_error_is_its_own(bench):
    done = bench("--only", "A1,A2,A3", "--json", "-")
    assert done.returncode == 1
    assert [row["id"] for row in json.loads(done.stdout)["rows"]] == ["A1"]
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: A2 was not measured: RuntimeError: the two sides disagree",
        "error: A3 was not measured: RuntimeError: A3 needs a CUDA device",
    ]


def test_a_run_that_is_killed_leaves_the_rows_of_the_scripts_before(bench, tmp_path):
    (tmp_path / "slow.py").write_text("import os\n\nIDS = ('S1',)\n\n\ndef run():\n    os.kill(os.getpid(), 9)\n", encoding="utf-8")
    done = bench("--only", "A1,B1,S1", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == -9
    assert [row["id"] for row in json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]] == ["A1", "B1"]


def test_a_missing_folder_of_the_json_file_is_refused_before_anything_runs(bench, tmp_path):
    (tmp_path / "other.py").write_text(OTHER.replace("    return", "    open(__file__ + '.ran', 'w')\n    return"), encoding="utf-8")
    done = bench("--json", str(tmp_path / "missing" / "rows.json"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"error: argument --json: {tmp_path / 'missing'} is not a folder")
    assert not (tmp_path / "other.py.ran").exists()


@pytest.mark.parametrize("raised", ["RuntimeError", "ImportError", "UserError"])
def test_a_script_of_its_own_ends_with_one_line_where_a_row_cannot_be_measured(bench, tmp_path, raised):
    main = f"def main():\n    raise {raised}('no such row\\nin detail')\n"
    imports = "import common\nfrom captioner.errors import UserError\n"
    (tmp_path / "alone.py").write_text(f"{imports}{main}common.run_main(main)\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(tmp_path / "alone.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: no such row\n")


@pytest.mark.parametrize("script", sorted(path.name for path in BENCH.glob("*.py") if path.name != "common.py"))
def test_every_script_ends_through_the_one_function(script):
    assert (BENCH / script).read_text(encoding="utf-8").endswith("run_main(main)\n")


def test_named_rows_alone_run_and_a_missed_bar_is_marked(bench):
    done = bench("--only", "A1,B1", "--json", "-")
    assert done.returncode == 0
    rows = {row["id"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["A1"]["ratio"] == 2.0 and rows["A1"]["ratio_range"] == [1.0, 3.0] and rows["B1"]["ratio"] == 4.0
    marked = [line.split()[0] for line in done.stderr.splitlines() if "MISSED" in line]
    assert marked == ["A1"]


def test_a_row_that_needs_a_gpu_is_an_error_where_it_is_named(bench):
    done = bench("--only", "A3")
    assert done.returncode == 1
    assert "error: A3 was not measured: RuntimeError: A3 needs a CUDA device" in done.stderr


def test_an_unknown_row_is_a_usage_error(bench):
    done = bench("--only", "B1,B7")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("error: no row B7: choose from A1, A2, A3, B1")


def test_a_script_that_cannot_be_imported_is_an_error_and_the_others_run(bench, tmp_path):
    (tmp_path / "broken.py").write_text("import not_installed_anywhere\n\nIDS = ('C1',)\n", encoding="utf-8")
    done = bench("--only", "B1", "--json", "-")
    assert done.returncode == 1
    assert [row["id"] for row in json.loads(done.stdout)["rows"]] == ["B1"]
    assert "error: broken.py was not measured: ModuleNotFoundError: No module named 'not_installed_anywhere'" in done.stderr


def test_the_scripts_of_this_repository_are_found_with_ids_that_are_unique():
    done = subprocess.run([sys.executable, str(BENCH / "all.py"), "--list"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(": ") for line in done.stdout.splitlines())
    names = ("encoder", "epoch", "memory", "cold_start", "train_step", "decode", "metrics", "cross_entropy", "lora_linear", "caption_folder", "feature_cache")
    assert set(found) == {f"{name}.py" for name in names}
    ids = [id for names in found.values() for id in names.split(", ")]
    assert len(set(ids)) == len(ids)
