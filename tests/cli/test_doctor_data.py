"""`kuea-mllm doctor --data`: what is found, what is written, and the exit code."""

import json

import pytest
from PIL import Image


def conversation(number, image):
    made = {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?" if image else "What is it?"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
    return {**made, "image": image} if image else made


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "gif.jpg", "GIF")
    return tmp_path


def write(folder, *images):
    path = folder / "mix.json"
    path.write_text(json.dumps([conversation(n, image) for n, image in enumerate(images)]))
    return f"--data={path}", f"--images={folder / 'images'}"


def test_sound_data_passes(kuea, folder):
    answer = kuea("doctor", *write(folder, "a.png", None))
    assert answer.code == 0, answer.out + answer.err
    assert "2, 1 of them without an image" in answer.out
    assert "no problems found" in answer.out


def test_misnamed_image_is_told_and_harms_nothing(kuea, folder):
    answer = kuea("doctor", *write(folder, "gif.jpg"))
    assert answer.code == 0, answer.out + answer.err
    assert "1 record, kept" in answer.out
    assert "is a GIF file" in answer.out


def test_missing_images_are_counted_and_the_first_ones_named(kuea, folder):
    answer = kuea("doctor", *write(folder, "a.png", *[f"gone{n}.png" for n in range(5)]))
    assert answer.code == 1
    assert "5 records, left out by --write-clean" in answer.out
    assert "record 1 (id 'r1')" in answer.out
    assert "gone0.png" in answer.out
    assert "gone4.png" not in answer.out
    assert "and 2 more" in answer.out
    assert "no problems found" not in answer.out


def test_json_lists_every_finding(kuea, folder):
    answer = kuea("doctor", *write(folder, "a.png", "gone.png", "gone.png"), "--json")
    assert answer.code == 1
    report = json.loads(answer.out)["data"]
    assert report["counts"] == {"missing image": 2}
    assert [each["index"] for each in report["findings"]] == [1, 2]
    assert report["records"] == 3


def test_cleaned_file_is_written_and_is_sound(kuea, folder):
    clean = folder / "clean.json"
    arguments = write(folder, "a.png", "gone.png", None)
    answer = kuea("doctor", *arguments, f"--write-clean={clean}")
    assert answer.code == 0, answer.out + answer.err
    assert "2 records, 1 left out, 0 corrected" in answer.out
    assert [each["id"] for each in json.loads(clean.read_text())] == ["r0", "r2"]
    again = kuea("doctor", f"--data={clean}", arguments[1])
    assert again.code == 0
    taken = kuea("doctor", *arguments, f"--write-clean={clean}")
    assert taken.code == 2
    assert "exists already" in taken.err


def test_data_without_images_checks_conversations_alone(kuea, folder):
    answer = kuea("doctor", write(folder, "gone.png")[0])
    assert answer.code == 0, answer.out + answer.err
    assert "not looked at" in answer.out


def test_bad_requests_are_one_line(kuea, folder):
    lonely = kuea("doctor", f"--write-clean={folder / 'clean.json'}")
    assert lonely.code == 2
    assert "Give the file with --data" in lonely.err
    (folder / "mix.json").write_text('[{"id": 1},')
    broken = kuea("doctor", f"--data={folder / 'mix.json'}")
    assert broken.code == 2
    assert "not valid JSON at record 1" in broken.err
    missing = kuea("doctor", f"--data={folder / 'none.json'}")
    assert missing.code == 2
    assert "none.json" in missing.err
