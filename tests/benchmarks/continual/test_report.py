"""The report of `bench continual`: its values are those of the results, and two runs can be compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from addenda.benchmarks.continual.columns import compare_reports, exactness, footnotes, print_comparison, verdict
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
    """A cell whose accuracies drop by a constant with each later experience, more so class-incrementally."""
    numbers = range(num_experiences)

    def matrix(less: float) -> list[list[float | None]]:
        learned, lost = LEARNED[method][seed] - less, LOST[method] + less / 2
        return [
            [learned - lost * (i - j) if j <= i else 0.125 if j == i + 1 else None for j in numbers] for i in numbers
        ]

    def metrics(rows: list[list[float | None]]) -> ContinualMetrics:
        seen = torch.tensor([[value or 0.0 for value in row] for row in rows], dtype=torch.float64).tril()
        forgetting = (seen.diagonal() - seen[-1])[:-1].mean().item() if num_experiences > 1 else None
        means = seen.sum(1) / torch.arange(1, num_experiences + 1)
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
        train_seconds=[10.0 + seed + i for i in numbers], stored_bytes=23_456.0 * (1 + len(method)),
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
    path = tmp_path_factory.mktemp("reports") / "new"
    write_report(results, path)
    return path


def saved(results: Results, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results.to_json()))
    return folder


def row_of(markdown: str, label: str) -> list[str]:
    """Cells of the first table row that starts with the label."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {label}"))
    return [text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("name", NOTES)
def test_the_table_has_the_values_of_the_results(results: Results, folder: Path, name: str) -> None:
    def over_seeds(values: list[float], scale: float, digits: int) -> str:
        numbers = scale * torch.tensor(values, dtype=torch.float64)
        return f"{abs(numbers.mean().item()):.{digits}f} ± {numbers.std(correction=1).item():.{digits}f}"

    cells = [cell for cell in results.cells if cell.method == name]
    label = {"addenda": "addenda", "finetune": "full fine-tuning", "prompt": "prompts &lt;script"}[name]
    shown = row_of((folder / "report.md").read_text(), label)
    task_incremental, class_incremental = (
        [cell.task_incremental_metrics for cell in cells],
        [cell.class_incremental_metrics for cell in cells],
    )
    assert shown[1:6] == [
        over_seeds([m.average_accuracy for m in task_incremental], 100, 1),
        over_seeds([m.average_accuracy for m in class_incremental], 100, 1),
        over_seeds([m.average_incremental_accuracy for m in class_incremental], 100, 1),
        over_seeds([m.forgetting for m in task_incremental], 100, 1),
        over_seeds([m.forgetting for m in class_incremental], 100, 1),
    ]
    assert shown[6] == ("identical" if name == "addenda" else "change by 1.3")
    assert shown[7] == {"addenda": "187.6 kB", "finetune": "211.1 kB", "prompt": "164.2 kB"}[name]
    assert shown[8:] == [over_seeds([33.0, 36.0], 1, 1), "2.25" if name == "prompt" else "1.00"]


@pytest.mark.slow
def test_a_single_seed_has_no_standard_deviation(tmp_path: Path) -> None:
    write_report(run(seeds=(1,)), tmp_path)
    shown = row_of((tmp_path / "report.md").read_text(), "addenda")
    assert shown[1] == "93.0"
    assert "±" not in "".join(shown)


def test_the_verdict_summarises_exactness_and_forgetting(results: Results) -> None:
    forgetting = "forgetting 0.0 ± 0.0 points task-incremental, 6.0 ± 0.0 class-incremental."
    assert verdict(results) == f"addenda: old tasks' logits identical, byte for byte, in all 2 seeds; {forgetting}"
    broken = [replace(cell, identical=False, max_difference=3e-5) if cell.method == "addenda" and cell.seed else cell
              for cell in results.cells]  # fmt: skip
    changed = verdict(replace(results, cells=broken))
    assert changed == f"addenda: old tasks' logits CHANGED in 1 of 2 seeds (by up to 3e-05); {forgetting}"
    others = replace(results, methods=results.methods[1:], cells=results.cells[2:])
    highest = "has the highest class-incremental average accuracy, 63.5 ± 2.1 %."
    assert verdict(others) == f"prompts {HOSTILE} {highest}"


@pytest.mark.slow
def test_a_single_experience_proves_nothing(tmp_path: Path) -> None:
    results = run(num_experiences=1)
    write_report(results, tmp_path)
    assert "no old task's logits to compare" in verdict(results)
    assert row_of((tmp_path / "report.md").read_text(), "addenda")[6] == "nothing to compare"
    assert "Proof of exactness" not in (tmp_path / "report.html").read_text()


def test_logits_of_a_baseline_that_diverged_change_by_nan(results: Results) -> None:
    cells = [replace(results.cells[2], max_difference=math.nan), results.cells[3]]
    assert exactness(cells) == exactness(cells[::-1]) == "change by nan"


def test_the_proof_counts_each_old_task_after_each_later_experience(folder: Path) -> None:
    text = (folder / "report.md").read_text().partition("Proof of exactness")[2]
    # Experience 0 (20 test images) is compared twice, experience 1 (21) once.
    assert [row_of(text, seed) for seed in "01"] == [[seed, "3", "61", "yes", "0"] for seed in "01"]


def test_the_notes_complete_the_table(results: Results, folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "old experiences: addenda 2.5 ± 0.7 %." in text
    alike = [replace(note, label="one name") for note in results.methods[:2]]
    changed = [replace(cell, changed_decisions=0.5) for cell in results.cells[:4]]
    assert footnotes(replace(results, methods=alike, cells=changed))[-1].count("one name 50.0 ± 0.0 %") == 2
    assert "| addenda | routers: nearest mean | 85.0 ± 7.1 % |" in text
    assert "| addenda | auroc | 0.875 |" in text


@pytest.mark.slow
def test_metrics_before_learning_are_shown_only_where_they_can_be_measured(
    results: Results, folder: Path, tmp_path: Path
) -> None:
    text = (folder / "report.md").read_text()
    assert "forward transfer |" not in text
    assert "in italics, before the experience was learned" in text
    assert "Forward transfer, and accuracy on an experience before it is learned, are shown only where" in text
    without_early = [
        replace(cell, **{
            setting: [
                [v if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(getattr(cell, setting))
            ]
            for setting in ("task_incremental", "class_incremental")
        }) for cell in results.cells
    ]  # fmt: skip
    write_report(replace(results, cells=without_early), tmp_path)
    assert not any("in italics" in (tmp_path / name).read_text() for name in ("report.md", "report.html"))
    with_transfer = [
        replace(cell, class_incremental_metrics=replace(cell.class_incremental_metrics, forward_transfer=0.25))
        for cell in results.cells
    ]
    write_report(replace(results, cells=with_transfer), tmp_path)
    text = (tmp_path / "report.md").read_text().partition("All Avalanche metrics")[2]
    assert row_of(text, "full fine-tuning | task-incremental")[-1] == "–"
    assert row_of(text, "full fine-tuning | class-incremental")[-1] == "25.0 ± 0.0"


@pytest.mark.slow
def test_expected_results_are_attributed_to_the_file_and_left_out_if_there_are_none(
    results: Results, folder: Path, tmp_path: Path
) -> None:
    write_report(replace(results, expected={}, command=""), tmp_path)
    for name in ("report.md", "report.html"):
        assert "Expected results of Addenda, from the stream's file" in (folder / name).read_text().replace(
            "&#39;", "'"
        )
        assert "Expected" not in (tmp_path / name).read_text()
        assert "shapes.yaml" in (folder / name).read_text()
        assert "shapes.yaml" not in (tmp_path / name).read_text()


def test_pictures_show_means_over_seeds_and_over_experiences_so_far(results: Results) -> None:
    cells = results.of("finetune")
    task_incremental = mean_matrix(cells, "task_incremental")
    assert task_incremental[1] == pytest.approx([0.955 - 0.35, 0.955, 0.125])
    assert task_incremental[0][2] is None
    second = accuracy_so_far(cells)[1]
    means = [(cell.class_incremental[1][0] + cell.class_incremental[1][1]) / 2 for cell in cells]
    assert second.mean == pytest.approx(sum(means) / 2)
    assert second.deviation == pytest.approx(torch.tensor(means, dtype=torch.float64).std().item())


def test_the_pictures_of_the_markdown_exist(folder: Path) -> None:
    linked = set(re.findall(r"\]\(([^)]*\.png)\)", (folder / "report.md").read_text()))
    assert linked == {path.name for path in folder.glob("*.png")}
    assert len(linked) == 2 + 2 * len(NOTES)


def test_the_page_has_no_external_references(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    sources = re.findall(r"""(?:src|srcset|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", page)
    assert len(sources) >= 2 * (2 + 2 * len(NOTES))
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<link|@import", page)


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_text_from_the_data_is_escaped(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 2  # the label of a method and that of a class


def test_results_survive_a_round_trip(results: Results, folder: Path) -> None:
    assert read_results(folder) == read_results(folder / "results.json") == results
    diverged = replace(results.cells[2], max_difference=math.inf)
    again = replace(results, cells=[diverged if c == results.cells[2] else c for c in results.cells])
    assert Results.from_json(json.dumps(again.to_json(), allow_nan=False), "it") == again


def corrupted(values: dict[str, Any], change: str) -> str:
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
    ("change", "message"),
    [
        ("cut off", "Invalid JSON: EOF while parsing"),
        ("unknown key", "surprise"),
        ("an accuracy of 91", "less than or equal to 1"),
        ("a short row", "class_incremental is not a square"),
        ("a hole", "task_incremental lacks the accuracy on an experience that was learned"),
        ("identical, but not", "identical is true, but max_difference is 0.5"),
        ("a cell twice", "a method has two cells with the same seed"),
        ("a method without cells", "methods must list each method of the cells once"),
        ("a class without a label", "a class without a label"),
        ("a method named like a path", "methods.0.name"),
    ],
)
def test_corrupt_results_are_refused_by_name(results: Results, tmp_path: Path, change: str, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(corrupted(results.to_json(), change))
    with pytest.raises(DataError) as caught:
        read_results(tmp_path)
    assert f"File {str(file)!r} does not contain valid results" in str(caught.value)
    assert message in str(caught.value)


def test_missing_and_foreign_results_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "my runs", tmp_path / "my runs" / "results.json"):
        create = f"Create one with `addenda bench continual STREAM --out '{tmp_path}/my runs'`."
        with pytest.raises(DataError, match=re.escape(f"There is no report at {str(path)!r}. {create}")):
            read_results(path)
    (tmp_path / "other.json").write_text('{"figures": []}')
    with pytest.raises(DataError, match=r"other\.json' does not contain valid results .*stream: Field required.* more"):
        read_results(tmp_path / "other.json")


def test_a_comparison_is_b_minus_a_with_both_standard_deviations(results: Results, tmp_path: Path) -> None:
    better = [replace(cell, task_incremental_metrics=replace(cell.task_incremental_metrics,
                                                             average_accuracy=0.96 + 0.02 * cell.seed))
              for cell in results.cells if cell.method != "prompt"]  # fmt: skip
    other = replace(results, cells=better, methods=results.methods[:2], environment={"torch": "3.0", "threads": 1})
    a, b = saved(results, tmp_path / "a"), saved(other, tmp_path / "b")
    comparison = compare_reports(a, b / "results.json")
    first = comparison["differences"][0]
    assert (first["method"], first["figure"]) == ("addenda", "average_accuracy_task_incremental")
    assert (first["a"]["mean"], first["b"]["mean"], first["change"]) == pytest.approx((0.92, 0.97, 0.05))
    assert first["a"]["deviation"] == first["b"]["deviation"] == pytest.approx(0.02 / 2**0.5)
    assert {difference["method"] for difference in comparison["differences"]} == {"addenda", "finetune"}
    assert (comparison["only_a"], comparison["only_b"]) == (["prompt"], [])
    assert comparison["settings"] == {"environment.torch": ["2.99", "3.0"]}
    assert comparison["exactness"]["addenda"] == ["identical", "identical"]
    assert json.loads(json.dumps(comparison)) == comparison

    with console.capture() as capture:
        print_comparison(comparison)
    lines = capture.get().splitlines()
    assert any(
        re.search(r"addenda.*task-incremental accuracy, % .* 92\.0 ± 1\.4 .* 97\.0 ± 1\.4 .* \+5\.0", line)
        for line in lines
    )
    assert sum("forward passes per image" in line for line in lines) == 2
    assert any(line.endswith("a; only in A: prompt") for line in lines)


def test_runs_of_different_streams_are_not_compared(results: Results, tmp_path: Path) -> None:
    a, b = saved(results, tmp_path / "a"), saved(replace(results, stream="digits"), tmp_path / "b")
    with pytest.raises(DataError, match=r"a' is of 'shapes', .*b' of 'digits'\. Give two runs of one stream"):
        compare_reports(a, b)
    swapped = [replace(results.experiences[0], classes=[2, 3]), *results.experiences[1:]]
    saved(replace(results, experiences=swapped), b)
    with pytest.raises(DataError, match=r"both of 'shapes', but their experiences differ"):
        compare_reports(a, b)


def test_runs_without_a_common_method_are_not_compared(results: Results, tmp_path: Path) -> None:
    a = saved(replace(results, methods=results.methods[:1], cells=results.cells[:2]), tmp_path / "a")
    b = saved(replace(results, methods=results.methods[1:], cells=results.cells[2:]), tmp_path / "b")
    with pytest.raises(DataError, match=r"no method in common: .*a' has addenda; .*b' has finetune, prompt"):
        compare_reports(a, b)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_renders_in_a_browser_without_a_network(browser: Any, folder: Path, width: int, scheme: str) -> None:
    context = browser.new_context(offline=True, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.goto((folder / "report.html").as_uri())
    assert errors == []
    assert page.title() == "Stream shapes"

    widths = page.eval_on_selector_all(".matrix img", "images => images.map(image => image.naturalWidth)")
    assert len(widths) == 2 * len(NOTES)
    assert min(widths) > 0
    shown = page.locator(".methods tr.ours").inner_text().split("\t")
    assert (shown[0], shown[1], shown[6]) == ("addenda", "92.0 ± 1.4", "identical")

    root = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert root[0] <= root[1]
    assert page.locator(".methods").bounding_box()["width"] > 400  # scrolls in its own box, nothing is cut off
    current = page.eval_on_selector(".curves img", "image => image.currentSrc")
    sources = page.eval_on_selector_all(".curves source", "all => all.map(source => source.srcset)")
    assert current == {
        (400, "dark"): sources[0], (400, "light"): sources[1], (1280, "dark"): sources[2],
        (1280, "light"): page.eval_on_selector(".curves img", "image => image.src"),
    }[width, scheme]  # fmt: skip
    context.close()
