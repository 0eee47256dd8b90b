"""The figures of docs/recipes.md are those of result files, of docs/data.md and of the settings."""

import re

from ruamel.yaml import YAML

from tests.documents.pages import ROOT
from tests.documents.test_figures import agrees, result, table

PAGE = (ROOT / "docs/recipes.md").read_text()
DATA = (ROOT / "docs/data.md").read_text()
RUNS = table(PAGE, "| date, commit ")


def settings(name):
    return YAML(typ="safe", pure=True).load(ROOT / name)


def run_with(words):
    (row,) = (row for row in RUNS if words in row[1])
    return row


def number(text, pattern):
    (shown,) = re.findall(pattern, text)
    return shown


def test_runs_are_newest_first_and_name_their_commit():
    dates = [re.match(r"(\d{4}-\d\d-\d\d), [0-9a-f]{7}$", row[0])[1] for row in RUNS]
    assert len(RUNS) >= 2
    assert dates == sorted(dates, reverse=True)


def test_the_row_of_the_demo_is_that_of_its_result_file():
    _, data, _, _, stages, hours, scores, _ = run_with("drawn world")
    reports, seconds = result("demo")["reports"], result("demo")["seconds"]
    found = reports["eval"]
    splits = reports["index"]["captions"]["splits"]
    assert number(data, r"with ([\d,]+) captions").replace(",", "") == str(splits["train"])
    assert number(data, r"and ([\d,]+) conv").replace(",", "") == str(reports["finetune"]["texts"])
    assert number(stages, r"of ([\d,]+) captions").replace(",", "") == str(
        reports["pretrain"]["texts"]
    )
    for shown, stage in zip(
        re.findall(r"loss ([\d.]+)", stages), ("pretrain", "finetune"), strict=True
    ):
        assert agrees(shown, reports[stage]["loss"])
    words = {1: "one", 2: "two", 3: "three"}
    epochs = [words[settings("params.yaml")[s]["epochs"]] for s in ("pretrain", "finetune")]
    assert re.findall(r"(\w+) epochs", stages) == epochs
    for shown, stage in zip(
        re.findall(r"[\d.]+", hours.split(";")[1]), ("pretrain", "finetune"), strict=True
    ):
        assert agrees(shown, seconds[f"train.{stage}"] / 3600)
    stage_1, stage_2 = re.findall(r"CIDEr ([\d.]+)", scores)
    assert agrees(stage_1, found["pretrain_only"]["captions"]["CIDEr"])
    assert agrees(stage_2, found["captions"]["CIDEr"])
    assert agrees(number(scores, r"exact match ([\d.]+)"), found["answers"]["exact_match"])
    pope = [section["f1"] for section in found["pope"].values()]
    assert len(pope) == 3
    assert agrees(number(scores, r"POPE ([\d.]+)"), sum(pope) / 3)
    blind = [
        found["pretrain_only"]["captions"]["CIDEr"]
        - found["pretrain_only"]["captions"]["blind"]["CIDEr"],
        found["captions"]["CIDEr"] - found["captions"]["blind"]["CIDEr"],
        found["answers"]["exact_match"] - found["answers"]["blind"]["exact_match"],
        (sum(pope) - sum(section["blind"]["f1"] for section in found["pope"].values())) / 3,
    ]
    gains = re.findall(r"gain ([\d.]+)", scores)
    assert all(map(agrees, gains, blind)), (gains, blind)
    assert len(gains) == len(blind)


def test_the_row_of_the_photographs_is_that_of_the_data_page():
    row = run_with("photographs of COCO")
    rows = {name: score for name, score, *_ in table(DATA, "| on the 44 photographs of val ")}
    assert f"Stage 2: CIDEr {rows['stage 2, CIDEr']}," in row[6]
    assert f"stage 1: CIDEr {rows['stage 1, CIDEr']}," in row[6]
    assert f"short answers right {rows['stage 2, 60 short answers right']}," in row[6]
    assert "**It failed**" in row[7]
    for shared in ("229 photographs", "1,146 captions", "two epochs", "EfficientNet-lite0"):
        assert shared in DATA
    assert "cut by hash into 229 and 44" in row[1]
    assert "two epochs of 1,146 captions" in row[4]


def test_the_target_is_that_of_the_settings_file():
    text = (ROOT / "configs/coco.yaml").read_text()
    assert settings("configs/coco.yaml")["pretrain"]["epochs"] == 3
    assert "trains stage 1 for three epochs" in PAGE
    header = " ".join(text.split("\nseed:")[0].replace("\n#", "").split())
    assert "CIDEr 1.0 (printed as 100 in papers) on Karpathy's split test" in header
    assert "POPE's mean F1 of 0.80 after stage 2" in header
    assert "**CIDEr 1.0 after stage 1 on Karpathy's test images**" in PAGE
    assert "**POPE 0.80 after stage 2**" in PAGE
    assert ("Nothing of it was run" in PAGE) is ("What was shown: nothing yet" in header)


def test_a_further_epoch_takes_a_third_of_stage_1():
    gpu = (ROOT / "docs/gpu.md").read_text()
    (hours,) = (row[2] for row in table(gpu, "| card | rate") if row[0].startswith("T4"))
    shown = number(PAGE, r"a further epoch is ([\d.]+) hours")
    assert agrees(shown, float(hours) / 3)


def test_every_neighbour_has_a_source():
    systems = table(PAGE, "| system | vision tower | language model ")
    models = table(PAGE, "| system | vision tower | POPE ")
    assert len(systems) > 5
    assert len(models) > 4
    for rows in (systems, models):
        linked = ["](https://" in row[-1] or row[-1] == "the same" for row in rows]
        assert all(linked)
        assert "](https://" in rows[0][-1]
