"""Files of prompts, as editors write them."""

from distillation.prompts import caption_of, read_captions, read_prompts


def test_the_mark_that_some_editors_begin_a_file_with_is_no_part_of_a_prompt(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat\n\na dog\n", encoding="utf-8-sig")
    assert read_prompts(file) == ["a cat", "a dog"]
    assert caption_of("p", tmp_path / "p.mp4", None) == "a cat a dog"
    file.write_text("a.mp4\ta cat\n", encoding="utf-8-sig")
    assert read_captions(file) == {"a.mp4": "a cat"}
