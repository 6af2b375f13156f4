"""Generated pages: a short README, tables as the result files have them, causes, headlines."""

import re

import pytest

from benchmarks import bars, headlines, losses, report, results, tables


def generated(path) -> str:
    """Return what stands between the markers of a page."""
    _, _, rest = path.read_text("utf-8").partition(report.BEGIN + "\n")
    part, found, _ = rest.partition("\n" + report.END)
    assert found, f"{path.name} has no {report.BEGIN} ... {report.END}"
    return part


def test_readme_is_short():
    assert len(report.README.read_text("utf-8").splitlines()) <= 200


def test_pages_hold_the_results():
    """``python -m benchmarks.report`` would change neither page."""
    documents = report.newest_documents(results.RESULTS)
    assert generated(report.README) == headlines.render(documents)
    pictures = report.pictures_of(results.RESULTS)
    assert generated(report.PAGE) == tables.render(documents, pictures)


def test_page_holds_the_loss_tables():
    text = losses.PAGE.read_text("utf-8")
    assert losses.with_tables(text) == text
    assert "``sp(t) = log(1 + exp(t))``" in text


def test_a_missed_bar_says_why():
    """The first cause whose patterns fit, then what was measured of it."""

    def cause(case, what, detail=""):
        return bars.Bar(case, what, 2.0, 1.0, detail).cause

    small = "GPU, qwen05-n256-bf16-frozen-peaked"
    assert cause(small, "direction time against TRL", "2.7 ms").startswith("the host")
    assert cause(small, "direction time against TRL", "2.7 ms").endswith("(2.7 ms)")
    assert "budget" in cause(small, "workspace against TRL")
    assert cause("GPU, something new", "time against quack") == "not looked into"
    assert bars.Bar(small, "direction time against TRL", 0.5, 1.0).cause == ""


def test_headlines_name_their_bars():
    """A bar that is met or missed, one that is set elsewhere, none at all."""
    row = {"kind": "time", "workload": "w", "pass": "forward_backward", "rows": 8, "hidden": 4096}
    row |= {"dtype": "bf16", "strategy": "direction", "gemm_units": 2}
    rows = [{**row, "provider": "spo", "median_ms": 8.0}]
    rows.append({**row, "provider": "trl", "median_ms": 10.0})
    document = {"machine": {"device": "x", "sm": "sm_90"}, "rows": rows}

    def line(**changes):
        return headlines._line(headlines.Headline("what", "w", "trl", **changes), [document])

    start = "| x | what | 8 ms | trl 10 ms | 0.800x |"
    assert line(bar="direction time against TRL").startswith(f"{start} 0.700x | **missed**: ")
    assert "(0.25x): unmeasured |" in line(bar="memory against Liger")
    assert line() == f"{start}  | no bar |"
    assert line(on_gpu=False) == "| CPU | what | | | | | unmeasured |"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["DPOTrainer", "SPOTrainer"])
def test_the_readmes_trainers_run(trainer, tmp_path, monkeypatch):
    """The examples that name a model and a dataset of the hub, on tiny ones and on a CPU."""
    import datasets

    from tests.helpers.trl_tiny import Tiny

    tiny = Tiny(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", report.README.read_text("utf-8"), re.S)
    (code,) = (block for block in blocks if f"{trainer}(" in block)
    code, models = re.subn(r'Trainer\("[^"]+"', f"Trainer({tiny.path!r}", code)
    quiet = "use_cpu=True, bf16=False, max_steps=1, report_to='none', save_strategy='no'"
    code, configs = re.subn(r'Config\("run"', f'Config("run", {quiet}', code)
    assert (models, configs) == (1, 1)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: tiny.dataset)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 1
