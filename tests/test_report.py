"""What an editor reads in a report: overview, how sure a verdict is, how often it errs, what was examined."""

import re
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from protoleak.forensics.rendering import _covered, make_case, render, render_cases
from protoleak.forensics.report import Examiner, errors_in_words, how_sure

RECORD = {
    "file": "x.png", "error": None, "origin": "camera", "label": "real", "contradiction": None,
    "attributions": [{"label": "real", "score": 0.9}, {"label": "a", "score": 0.1}],
}  # fmt: skip


def test_how_sure_a_verdict_is():
    assert how_sure(RECORD) == "steadily; likeliest real (90%)"
    held, not_held = {"stability": {"kept": 3, "of": 3}}, {"stability": {"kept": 0, "of": 3}}
    assert how_sure(RECORD | held) == "steadily; likeliest real (90%); held 3 of 3 times"
    assert how_sure(RECORD | not_held).startswith("weakly")
    assert how_sure(RECORD | held | {"contradiction": "the file itself claims"}).startswith("weakly")
    assert how_sure(RECORD | held | {"origin": "can't tell"}).startswith("not;")
    assert how_sure(RECORD | {"origin": None, "label": "no evidence"}).startswith("not;")
    assert how_sure(RECORD | {"error": "no image", "attributions": None}) == ""


def test_how_often_it_errs_is_told_of_other_sources_where_that_was_measured():
    rates = {"camera_called_generated": 0.05, "real_called_camera": 0.1, "real_cant_tell": 0.85}
    rates |= {"generated_called_camera": 0.004}
    others = rates | {"camera_called_generated": 0.2, "real_cant_tell": 0.7}
    same = errors_in_words({"splits": {"test": {"metrics": rates}}})
    assert "of 100 photographs 5.0 were called generated, 10.0 a camera's, and of 85.0 it could not" in same
    assert "of 100 generated images 0.4 were called a camera's" in same
    both = errors_in_words({"splits": {"test": {"metrics": rates}, "cross": {"metrics": others}}})
    assert "20.0 were called generated" in both
    assert "from sources that training never saw" in both
    for measured in ({}, {"splits": {}}, {"splits": {"test": {"metrics": {"macro_auc": 0.5}}}}):
        assert errors_in_words(measured) is None


@pytest.mark.parametrize(
    ("boxes", "pixels"),
    [
        ([], 0),
        ([(0, 0, 10, 10)], 100),
        ([(0, 0, 10, 10), (5, 0, 10, 10)], 150),
        ([(0, 0, 10, 10), (0, 0, 10, 10), (20, 20, 1, 2)], 102),
        ([(0, 0, 30, 10), (10, 0, 10, 30)], 500),
    ],
)
def test_what_crops_cover_together(boxes, pixels):
    assert _covered(boxes) == pixels


def test_an_overview_comes_first(checkpoint, photo, tmp_path, monkeypatch):
    """Each image has a row with its path, verdict and how sure, and a place that the row leads to."""
    monkeypatch.setattr("protoleak.forensics.rendering._drawings", lambda *case: [])  # they take long
    folder = tmp_path / "desk" / "inner"
    folder.mkdir(parents=True)
    files = [folder / "one.png", folder / "two & three.png", folder / "bad.png"]
    photo.save(files[0])
    photo.rotate(90, expand=True).save(files[1])
    files[2].write_text("no image")
    examiner = Examiner(str(checkpoint))
    records = [examiner.examine(file) for file in files]
    page = render(examiner, records).replace("<wbr>", "")
    overview = page[page.index('class="overview"') : page.index("</table>")]
    rows = overview.split("<tr>")[1:]
    assert len(rows) == 3
    for i, (row, record, file) in enumerate(zip(rows, records, files, strict=True), 1):
        assert f'href="#image-{i}">{str(file).replace("&", "&amp;")}</a>' in row
        assert page.count(f'id="image-{i}"') == 1
        sentence = record["verdict"] or "could not be examined"
        assert sentence in row.replace("&#39;", "'")
        assert ("data:image/jpeg" in row) == (record["error"] is None)
    assert re.search(r"3 images: .*1 could not be examined", page)
    cases = [make_case(examiner, record, folders=False, drawn=False) for record in records]
    part = render_cases(cases, "Examining image 4")
    assert str(tmp_path) not in part.replace(str(records[2]["error"]), "")
    assert "Examining image 4" in part
    assert "<section" not in part  # the overview alone, while it works
    assert render_cases(cases).count("<section") == 3


def test_the_overview_has_the_claim_of_a_file(checkpoint, photo, tmp_path):
    """Whatever the verdict; where it contradicts it, the contradiction has it."""
    path = tmp_path / "dream.png"
    photo.save(path, pnginfo=_parameters("a cat\nSteps: 20, Sampler: Euler a, Model: dream_8"))
    examiner = Examiner(str(checkpoint))
    record = examiner.examine(path)
    claim = record["provenance"]["claim"]["words"]
    for contradiction in (None, f"the file itself claims otherwise: {claim}"):
        case = make_case(examiner, record | {"contradiction": contradiction}, folders=False, drawn=False)
        page = render_cases([case])
        overview = page[page.index('class="overview"') : page.index("</table>")]
        assert overview.count(claim) == 1
        assert ("The file itself claims: " in overview) == (contradiction is None)


def _parameters(text: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    return info


def test_what_was_examined_is_drawn_on_the_upright_image(checkpoint, tmp_path):
    """A strip of 200 x 40, turned by its orientation: its one crop is outlined where a viewer sees it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((200, 40), 50).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    examiner = Examiner(str(checkpoint))
    examiner.attributor.processor.do_resize = False
    record = examiner.examine(Path(tmp_path / "turned.jpg"))
    part = render_cases([make_case(examiner, record, folders=False, drawn=False)])
    assert 'viewBox="0 0 40 200"' in part
    assert '<rect x="4" y="84" width="32" height="32" fill="none"' in part
    assert "Examined: 13 % of the image" in part
    assert "what is pale was not looked at" in part
