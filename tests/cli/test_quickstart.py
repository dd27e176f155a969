"""`kuea-mllm quickstart`, shortened, as a user would start it."""

import json
import os
import subprocess
import sys


def test_quickstart_ends_with_a_report_and_lmms_eval_computed_the_scores(tmp_path):
    out = tmp_path / "quick"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kuea_mllm",
            "quickstart",
            f"--out={out}",
            "--steps=10",
            "--questions=40",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    html = (out / "report.html").read_text()
    for text in ("miniworld_pope", "Kernel matrices", "Example questions", "Loss terms"):
        assert text in html
    assert "http://" not in html.replace("http://www.w3.org", "")

    columns = result["comparison"]["columns"]
    for model in ("original", "aligned"):
        files = list((out / "results" / model / "lmms").rglob("*_results.json"))
        assert len(files) == 1
        scored = json.loads(files[0].read_text())["results"]
        assert set(scored) == set(columns)
        side = "baseline" if model == "original" else "candidate"
        for task, column in columns.items():
            metric = next(key for key in scored[task] if key.startswith(column["metric"] + ","))
            assert abs(scored[task][metric] - column[side]) < 1e-9
    used = result["comparison"]["candidate"]["model"]["tower_fingerprint"]
    manifest = json.loads((out / "llava-aligned" / "kuea.json").read_text())
    assert used == manifest["tower"]["fingerprint"]
    assert used != result["comparison"]["baseline"]["model"]["tower_fingerprint"]
