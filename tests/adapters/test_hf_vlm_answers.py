"""Which token begins an answer: the chat template decides, not the bare word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_vlm_samples import make_tokenizer
from PIL import Image
from test_hf_vlm_runtime import requests, write_llava_next
from tokenizers.pre_tokenizers import ByteLevel
from transformers import DeepseekVLImageProcessor, GPTNeoXTokenizer, LlavaImageProcessor
from transformers.utils import chat_template_utils

from kuea_mllm.adapters.choosing import likeliest
from kuea_mllm.adapters.hf_vlm.adapter import HFVLMAdapter
from kuea_mllm.adapters.hf_vlm.answering import answer_tokens
from kuea_mllm.adapters.hf_vlm.runtime import HFVLMRuntime, _pads_to_square
from kuea_mllm.errors import UserError

# The user's words end with a line break; what follows is set by each test.
ASKED = "{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'][0]['text'] }}\n"
SAID = "{% else %}SAID{{ m['content'][0]['text'] }}\n{% endif %}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}PROMPT{% endif %}"


class Processor:
    """Tokenizer and chat template of a model whose vocabulary keeps blanks with their words."""

    def __init__(self, said: str, prompt: str, before: str = "") -> None:
        names = ["<|endoftext|>", "<|padding|>", *sorted(ByteLevel.alphabet())]
        merges = []
        for pieces in (("Y", "e"), ("Ye", "s"), ("N", "o"), ("Ġ", "Yes"), ("Ġ", "No")):
            merges.append(pieces)
            names.append("".join(pieces))
        self.tokenizer: Any = GPTNeoXTokenizer(
            vocab={name: number for number, name in enumerate(names)}, merges=merges
        )
        self._template = before + ASKED + SAID.replace("SAID", said) + PROMPT
        self._template = self._template.replace("PROMPT", prompt)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        render: Any = chat_template_utils.render_jinja_template
        return str(render([messages], chat_template=self._template, **options)[0][0])


def words(processor: Processor) -> list[str]:
    tokens = answer_tokens(processor, ("Yes", "No"), "the model")
    found: list[str] = processor.tokenizer.convert_ids_to_tokens(tokens)
    return found


@pytest.mark.parametrize(
    ("said", "prompt", "blank"),
    [
        ("Assistant: ", "Assistant:", "Ġ"),
        ("<|assistant|>\n", "<|assistant|>\n", ""),
        # A model that is left to write behind a blank writes the word alone.
        ("Assistant: ", "Assistant: ", ""),
        # Nothing to be seen of an answer.
        ("Bot: ", "Assistant:", ""),
    ],
)
def test_blank_before_an_answer_is_a_part_of_its_token(said: str, prompt: str, blank: str) -> None:
    assert words(Processor(said, prompt)) == [f"{blank}Yes", f"{blank}No"]


def test_template_that_takes_no_answers_leaves_the_bare_words() -> None:
    refusal = "{% if messages | length > 1 %}{{ 1 / 0 }}{% endif %}"
    assert words(Processor("Assistant: ", "Assistant:", refusal)) == ["Yes", "No"]


def test_other_words_before_an_answer_are_refused() -> None:
    with pytest.raises(UserError, match="puts '<think></think>' before an answer"):
        words(Processor("Assistant:<think></think>\n", "Assistant:"))


def test_break_before_an_answer_is_refused() -> None:
    with pytest.raises(UserError, match="candidate 'Yes' is not one token"):
        words(Processor("Assistant:\n", "Assistant:"))


def test_choice_is_by_the_tokens_behind_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_llava_next(tmp_path / "vlm")
    runtime = HFVLMAdapter().open_runtime(base, dtype="float32", device="cpu")
    assert isinstance(runtime, HFVLMRuntime)
    rows, candidates = requests()[:6], ["Yes", "No", "Perhaps"]
    with pytest.raises(UserError, match="candidate 'Yes' is not one token"):
        runtime.choose([], candidates)
    vocabulary = make_tokenizer().get_vocab()
    # Tokens of the tiny vocabulary in their place.
    tokens = [vocabulary[name] for name in "!?+"]
    monkeypatch.setattr("kuea_mllm.adapters.hf_vlm.runtime.answer_tokens", lambda *_: tokens)
    with torch.inference_mode():
        logits = [runtime.model(**runtime.prepare([row])).logits[:, -1, tokens] for row in rows]
    expected = likeliest(torch.cat(logits), candidates)
    assert len(set(expected)) > 1
    assert runtime.choose(rows, candidates) == expected


def test_model_says_whether_it_sees_images_in_a_square() -> None:
    picture = Image.new("RGB", (40, 20), "red")
    for kind in (LlavaImageProcessor, DeepseekVLImageProcessor):
        size = {"height": 16, "width": 16}
        for pads in (True, False):
            processor = kind(size=size, do_pad=pads, do_center_crop=False, do_normalize=False)
            assert _pads_to_square(processor) == pads
            if pads:
                found = processor([picture], return_tensors="pt")["pixel_values"][0]
                # Something else above and below, in equal parts.
                rows = (found == found[:, 8:9]).all(dim=(0, 2)).nonzero().flatten().tolist()
                assert rows[0] + rows[-1] == 15
                assert len(rows) < 16
