"""The report of `bench continual`: every figure is the input's, whole on one page, and two runs can be compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from addenda.benchmarks.continual.columns import exactness, verdict
from addenda.benchmarks.continual.comparison import compare_reports, print_comparison
from addenda.benchmarks.continual.report import accuracy_so_far, mean_matrix, write_report
from addenda.benchmarks.continual.results import (
    Cell,
    ContinualMetrics,
    ExperienceNote,
    MethodNote,
    Results,
    read_results,
)
from addenda.exceptions import DataError
from addenda.terminal import console

HOSTILE = "<script>document.title = 'broken'</script> | $\\frac"
NOTES = {
    "addenda": MethodNote("addenda", "addenda", "no forgetting, task-incremental", verified=True),
    "finetune": MethodNote("finetune", "full fine-tuning", "", verified=True),
    "prompt": MethodNote("prompt", f"prompts {HOSTILE}", "a port", verified=False),
}
LEARNED = {"addenda": (0.91, 0.93), "finetune": (0.95, 0.96), "prompt": (0.84, 0.87)}
LOST = {"addenda": 0.0, "finetune": 0.35, "prompt": 0.1}


def cell(method: str, seed: int, num_experiences: int = 3) -> Cell:
    """Accuracy is lost at one rate with each later experience, and a little more class-incrementally."""
    many = range(num_experiences)

    def matrix(less: float) -> list[list[float | None]]:
        learned, lost = LEARNED[method][seed] - less, LOST[method] + less / 2
        return [[learned - lost * (i - j) if j <= i else 0.125 if j == i + 1 else None for j in many] for i in many]

    def metrics(rows: list[list[float | None]]) -> ContinualMetrics:
        met = torch.tensor([[value or 0.0 for value in row] for row in rows], dtype=torch.float64).tril()
        forgetting = (met.diagonal() - met[-1])[:-1].mean().item() if num_experiences > 1 else None
        means = met.sum(1) / torch.arange(1, num_experiences + 1)
        return ContinualMetrics(
            means[-1].item(), means.mean().item(), forgetting, None if forgetting is None else -forgetting, None
        )

    task_incremental, class_incremental = matrix(0.0), matrix(0.08)
    return Cell(
        method=method, seed=seed, task_incremental=task_incremental, class_incremental=class_incremental,
        comparisons=num_experiences * (num_experiences - 1) // 2,
        identical=method == "addenda" if num_experiences > 1 else None,
        max_difference=0.0 if method == "addenda" else 0.31 + seed,
        changed_decisions=0.02 + 0.01 * seed if method == "addenda" else None,
        train_seconds=[10.0 + seed + i for i in many], stored_bytes=23_456.0 * (1 + len(method)),
        relative_inference=1.0 if method != "prompt" else 2.25,
        task_incremental_metrics=metrics(task_incremental), class_incremental_metrics=metrics(class_incremental),
        extra={"routers": {"nearest mean": 0.8 + 0.1 * seed}, "auroc": 0.875} if method == "addenda" else {},
    )  # fmt: skip


def run(num_experiences: int = 3, seeds: tuple[int, ...] = (0, 1)) -> Results:
    return Results(
        stream="shapes", command="addenda bench continual shapes.yaml", hardware="two cores",
        expected={"task_incremental": 0.92},
        experiences=[ExperienceNote(f"shapes_{i}", [2 * i, 2 * i + 1], 40 + i, 20 + i) for i in range(num_experiences)],
        labels=[HOSTILE, *(f"shape {i}" for i in range(1, 2 * num_experiences))],
        config={"seeds": list(seeds), "methods": {"addenda": {"epochs": 30}}},
        environment={"torch": "2.99", "threads": 1}, methods=list(NOTES.values()),
        cells=[cell(name, seed, num_experiences) for name in NOTES for seed in seeds],
    )  # fmt: skip


@pytest.fixture(scope="module")
def results() -> Results:
    return run()


@pytest.fixture(scope="module")
def folder(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reports") / "new"
    write_report(results, place)
    return place


def kept(results: Results, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results.to_json()))
    return folder


def row_of(markdown: str, label: str) -> list[str]:
    """The cells of the first table's row that starts with the label."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {label}"))
    return [text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("name", NOTES)
def test_every_figure_of_the_table_is_the_inputs(results: Results, folder: Path, name: str) -> None:
    def over_seeds(values: list[float], scale: float, digits: int) -> str:
        numbers = scale * torch.tensor(values, dtype=torch.float64)
        return f"{abs(numbers.mean().item()):.{digits}f} ± {numbers.std(correction=1).item():.{digits}f}"

    cells = [one for one in results.cells if one.method == name]
    label = {"addenda": "addenda", "finetune": "full fine-tuning", "prompt": "prompts &lt;script"}[name]
    shown = row_of((folder / "report.md").read_text(), label)
    task_incremental, class_incremental = (
        [one.task_incremental_metrics for one in cells],
        [one.class_incremental_metrics for one in cells],
    )
    assert shown[1:6] == [
        over_seeds([m.average_accuracy for m in task_incremental], 100, 1),
        over_seeds([m.average_accuracy for m in class_incremental], 100, 1),
        over_seeds([m.average_incremental_accuracy for m in class_incremental], 100, 1),
        over_seeds([m.forgetting for m in task_incremental], 100, 1),
        over_seeds([m.forgetting for m in class_incremental], 100, 1),
    ]
    assert shown[6] == ("identical" if name == "addenda" else "moves by 1.3")
    assert shown[7] == {"addenda": "187.6 kB", "finetune": "211.1 kB", "prompt": "164.2 kB"}[name]
    assert shown[8:] == [over_seeds([33.0, 36.0], 1, 1), "2.25" if name == "prompt" else "1.00"]
    assert ("†" in shown[0]) == (name == "prompt")


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    write_report(run(seeds=(1,)), tmp_path)
    shown = row_of((tmp_path / "report.md").read_text(), "addenda")
    assert shown[1] == "93.0"
    assert "±" not in "".join(shown)


def test_the_verdict_says_what_was_measured(results: Results) -> None:
    lost = "forgetting 0.0 ± 0.0 points task-incremental, 6.0 ± 0.0 class-incremental."
    assert verdict(results) == f"addenda: old tasks' logits identical, byte for byte, in all 2 seeds; {lost}"
    broken = [replace(one, identical=False, max_difference=3e-5) if one.method == "addenda" and one.seed else one
              for one in results.cells]  # fmt: skip
    moved = verdict(replace(results, cells=broken))
    assert moved == f"addenda: old tasks' logits MOVED in 1 of 2 seeds (moves by 3e-05); {lost}"
    others = replace(results, methods=results.methods[1:], cells=results.cells[2:])
    assert verdict(others) == "prompts " + HOSTILE + ": the highest class-incremental average accuracy, 63.5 ± 2.1 %."


def test_one_experience_proves_nothing(tmp_path: Path) -> None:
    alone = run(num_experiences=1)
    write_report(alone, tmp_path)
    assert "no old task's logits to compare" in verdict(alone)
    assert row_of((tmp_path / "report.md").read_text(), "addenda")[6] == "nothing to compare"
    assert "proof of exactness" not in (tmp_path / "report.html").read_text()


def test_a_rival_that_diverged_moves_by_nan(results: Results) -> None:
    cells = [replace(results.cells[2], max_difference=math.nan), results.cells[3]]
    assert exactness(cells) == exactness(cells[::-1]) == "moves by nan"


def test_the_proof_counts_each_old_task_after_each_later_experience(folder: Path) -> None:
    text = (folder / "report.md").read_text().partition("The proof of exactness")[2]
    # Experience 0 (20 test images) is compared twice, experience 1 (21) once.
    assert [row_of(text, seed) for seed in "01"] == [[seed, "3", "61", "yes", "0"] for seed in "01"]


def test_the_notes_say_what_the_table_cannot(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "old experiences: addenda 2.5 ± 0.7 %." in text
    assert "code not checked against a published figure" in text
    assert "| addenda | routers: nearest mean | 85.0 ± 7.1 % |" in text
    assert "| addenda | auroc | 0.875 |" in text


@pytest.mark.slow
def test_before_it_is_learned_an_experience_has_figures_only_where_it_can_be_answered(
    results: Results, folder: Path, tmp_path: Path
) -> None:
    text = (folder / "report.md").read_text()
    assert "forward transfer |" not in text
    assert "in italics, before the experience was learned" in text
    assert "Forward transfer, and accuracy on an experience before it is learned, are given only where" in text
    new = [
        replace(one, **{
            setting: [[v if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(getattr(one, setting))]
            for setting in ("task_incremental", "class_incremental")
        }) for one in results.cells
    ]  # fmt: skip
    write_report(replace(results, cells=new), tmp_path)
    assert not any("in italics" in (tmp_path / name).read_text() for name in ("report.md", "report.html"))
    some = [
        replace(one, class_incremental_metrics=replace(one.class_incremental_metrics, forward_transfer=0.25))
        for one in results.cells
    ]
    write_report(replace(results, cells=some), tmp_path)
    text = (tmp_path / "report.md").read_text().partition("All of Avalanche's figures")[2]
    assert row_of(text, "full fine-tuning | task-incremental")[-1] == "–"
    assert row_of(text, "full fine-tuning | class-incremental")[-1] == "25.0 ± 0.0"


def test_what_the_file_expects_is_said_to_be_the_files_and_left_out_where_there_is_none(
    results: Results, folder: Path, tmp_path: Path
) -> None:
    write_report(replace(results, expected={}, command=""), tmp_path)
    for name in ("report.md", "report.html"):
        assert "Expected of Addenda, by the stream's file" in (folder / name).read_text().replace("&#39;", "'")
        assert "Expected" not in (tmp_path / name).read_text()
        assert "shapes.yaml" in (folder / name).read_text()
        assert "shapes.yaml" not in (tmp_path / name).read_text()


def test_pictures_show_means_over_seeds_and_over_what_was_met(results: Results) -> None:
    cells = results.of("finetune")
    task_incremental = mean_matrix(cells, "task_incremental")
    assert task_incremental[1] == pytest.approx([0.955 - 0.35, 0.955, 0.125])
    assert task_incremental[0][2] is None
    second = accuracy_so_far(cells)[1]
    each = [(one.class_incremental[1][0] + one.class_incremental[1][1]) / 2 for one in cells]
    assert second.mean == pytest.approx(sum(each) / 2)
    assert second.deviation == pytest.approx(torch.tensor(each, dtype=torch.float64).std().item())


def test_the_markdown_shows_pictures_that_are_there(folder: Path) -> None:
    named = set(re.findall(r"\]\(([^)]*\.png)\)", (folder / "report.md").read_text()))
    assert named == {path.name for path in folder.glob("*.png")}
    assert len(named) == 2 + 2 * len(NOTES)


def test_the_page_refers_to_nothing_outside_itself(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    sources = re.findall(r"""(?:src|srcset|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", page)
    assert len(sources) >= 2 * (2 + 2 * len(NOTES))
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<link|@import", page)


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_text_of_the_data_is_never_markup(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 2  # a method's label and a class's


def test_the_results_are_read_as_they_were_written(results: Results, folder: Path) -> None:
    assert read_results(folder) == read_results(folder / "results.json") == results
    diverged = replace(results.cells[2], max_difference=math.inf)
    again = replace(results, cells=[diverged if one == results.cells[2] else one for one in results.cells])
    assert Results.from_json(json.dumps(again.to_json(), allow_nan=False), "it") == again


def damaged(values: dict[str, Any], change: str) -> str:
    if change == "unknown key":
        values["surprise"] = 1
    elif change == "an accuracy of 91":
        values["cells"][0]["task_incremental"][0][0] = 91
    elif change == "a short row":
        values["cells"][0]["class_incremental"][1].pop()
    elif change == "a hole":
        values["cells"][0]["task_incremental"][2][0] = None
    elif change == "identical, but not":
        values["cells"][0]["max_difference"] = 0.5
    elif change == "a cell twice":
        values["cells"].append(values["cells"][0])
    elif change == "a method without cells":
        values["cells"] = values["cells"][:4]
    elif change == "a class without a label":
        values["labels"].pop()
    elif change == "a method named like a path":
        values["methods"][0]["name"] = values["cells"][0]["method"] = values["cells"][1]["method"] = "../addenda"
    text = json.dumps(values)
    return text[: len(text) // 2] if change == "cut off" else text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("cut off", "Invalid JSON: EOF while parsing"),
        ("unknown key", "surprise"),
        ("an accuracy of 91", "less than or equal to 1"),
        ("a short row", "class_incremental is not a square"),
        ("a hole", "task_incremental has no accuracy on an experience that was learned"),
        ("identical, but not", "identical, yet max_difference is 0.5"),
        ("a cell twice", "a method has two cells of one seed"),
        ("a method without cells", "methods are not those of the cells"),
        ("a class without a label", "a class without a label"),
        ("a method named like a path", "methods.0.name"),
    ],
)
def test_damaged_results_are_refused_by_name(results: Results, tmp_path: Path, change: str, said: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(damaged(results.to_json(), change))
    with pytest.raises(DataError) as caught:
        read_results(tmp_path)
    assert f"The file {str(file)!r} holds no whole results" in str(caught.value)
    assert said in str(caught.value)


def test_results_that_are_missing_or_foreign_are_refused_by_name(tmp_path: Path) -> None:
    for place in (tmp_path / "my runs", tmp_path / "my runs" / "results.json"):
        made = f"`addenda bench continual STREAM --out '{tmp_path}/my runs'` makes one."
        with pytest.raises(DataError, match=re.escape(f"There is no report at {str(place)!r}. {made}")):
            read_results(place)
    (tmp_path / "other.json").write_text('{"figures": []}')
    with pytest.raises(DataError, match=r"other\.json' holds no whole results .*stream: Field required.* more"):
        read_results(tmp_path / "other.json")


def test_a_comparison_gives_b_less_a_with_both_spreads(results: Results, tmp_path: Path) -> None:
    better = [replace(one, task_incremental_metrics=replace(one.task_incremental_metrics,
                                                            average_accuracy=0.96 + 0.02 * one.seed))
              for one in results.cells if one.method != "prompt"]  # fmt: skip
    other = replace(results, cells=better, methods=results.methods[:2], environment={"torch": "3.0", "threads": 1})
    a, b = kept(results, tmp_path / "a"), kept(other, tmp_path / "b")
    comparison = compare_reports(a, b / "results.json")
    first = comparison.to_json()["differences"][0]
    assert (first["method"], first["figure"]) == ("addenda", "average_accuracy_task_incremental")
    assert (first["a"]["mean"], first["b"]["mean"], first["change"]) == pytest.approx((0.92, 0.97, 0.05))
    assert first["a"]["deviation"] == first["b"]["deviation"] == pytest.approx(0.02 / 2**0.5)
    assert {one.method for one in comparison.differences} == {"addenda", "finetune"}
    assert (comparison.only_a, comparison.only_b) == (("prompt",), ())
    assert comparison.settings == {"environment.torch": ("2.99", "3.0")}
    assert json.loads(json.dumps(comparison.to_json()))["exactness"]["addenda"] == ["identical", "identical"]

    with console.capture() as capture:
        print_comparison(comparison)
    lines = capture.get().splitlines()
    assert any(
        re.search(r"addenda.*task-incremental accuracy, % .* 92\.0 ± 1\.4 .* 97\.0 ± 1\.4 .* \+5\.0", line)
        for line in lines
    )
    assert any(line.endswith("a; only there: prompt") for line in lines)


def test_runs_of_different_streams_are_not_compared(results: Results, tmp_path: Path) -> None:
    a, b = kept(results, tmp_path / "a"), kept(replace(results, stream="digits"), tmp_path / "b")
    with pytest.raises(DataError, match=r"a' is of 'shapes', .*b' of 'digits'\. Give two runs of one stream"):
        compare_reports(a, b)
    swapped = [replace(results.experiences[0], classes=[2, 3]), *results.experiences[1:]]
    kept(replace(results, experiences=swapped), b)
    with pytest.raises(DataError, match=r"both called 'shapes', but their experiences differ"):
        compare_reports(a, b)


def test_runs_without_a_common_method_are_not_compared(results: Results, tmp_path: Path) -> None:
    a = kept(replace(results, methods=results.methods[:1], cells=results.cells[:2]), tmp_path / "a")
    b = kept(replace(results, methods=results.methods[1:], cells=results.cells[2:]), tmp_path / "b")
    with pytest.raises(DataError, match=r"No method is in both: .*a' has addenda; .*b' has finetune, prompt"):
        compare_reports(a, b)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_whole_in_a_browser_without_a_network(browser: Any, folder: Path, width: int, scheme: str) -> None:
    context = browser.new_context(offline=True, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto((folder / "report.html").as_uri())
    assert complaints == []
    assert page.title() == "The stream shapes"

    widths = page.eval_on_selector_all(".matrix img", "images => images.map(image => image.naturalWidth)")
    assert len(widths) == 2 * len(NOTES)
    assert min(widths) > 0
    shown = page.locator(".methods tr.ours").inner_text().split("\t")
    assert (shown[0], shown[1], shown[6]) == ("addenda", "92.0 ± 1.4", "identical")

    root = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert root[0] <= root[1]
    assert page.locator(".methods").bounding_box()["width"] > 400  # it scrolls in its own box, nothing is cut off
    chosen = page.eval_on_selector(".curves img", "image => image.currentSrc")
    sources = page.eval_on_selector_all(".curves source", "all => all.map(source => source.srcset)")
    assert chosen == {
        (400, "dark"): sources[0], (400, "light"): sources[1], (1280, "dark"): sources[2],
        (1280, "light"): page.eval_on_selector(".curves img", "image => image.src"),
    }[width, scheme]  # fmt: skip
    context.close()
