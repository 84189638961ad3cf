"""Texts with images as models that see read them: three families of processors, the loss on words alone."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import CHAT_TEMPLATE, save_tiny_gemma, tiny_tokenizer
from tokenizers import processors
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from lora_squeeze.attaching import attach_lora
from lora_squeeze.collating import collate
from lora_squeeze.data import Chat, Choice, Completion, Message, Text, opened, picture_of
from lora_squeeze.encoding import IGNORED, encode, pieces_of
from lora_squeeze.errors import DataError, ModelError
from lora_squeeze.evaluation.rows import rows_of
from lora_squeeze.models import load_model, load_seeing, plain_template
from lora_squeeze.seeing import Seeing, seeing_of

IN_PARTS = (
    "{% for message in messages %}<|{{ message.role }}|>{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RED, GREEN, BLUE = (
    picture_of(Image.new("RGB", size, colour))
    for size, colour in (((40, 30), (250, 0, 0)), ((50, 30), (0, 250, 0)), ((60, 70), (0, 0, 250)))
)
ASKED = (
    Message("user", "hi\ufffc"),
    Message("assistant", "ok"),
    Message("user", "\ufffcand?"),
    Message("assistant", "yes"),
)
EXAMPLES = {
    "one image": Completion("What?", "red", (RED,)),
    "no image": Completion("Nothing?", "no"),
    "two images in their places": Completion("a <image> b <image> c", "two", (GREEN, BLUE)),
    "a conversation": Chat(ASKED, (RED, BLUE)),
}
LEARNT = {
    "one image": "red<eos>",
    "no image": "no<eos>",
    "two images in their places": "two<eos>",
    "a conversation": "ok<eos>yes<eos>",
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """A tiny model that sees, its processor, and how many tokens one image takes."""

    seeing: Seeing
    model: Any
    image_tokens: int


def gemma(folder) -> Family:
    save_tiny_gemma(folder, sees=True, template=IN_PARTS.replace("IMAGE", "<image_starts>"))
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return Family(
        seeing_of(processor, processor.tokenizer), model, image_tokens=8
    )  # four, two that frame, two newlines


def llava(folder) -> Family:
    tokenizer = tiny_tokenizer(image_token="<image>")
    eye = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        image_processor=eye,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IN_PARTS.replace("IMAGE", "<image>\n"),
    )
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **SIZES),
        vision_config=CLIPVisionConfig(**EYES),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Family(seeing_of(processor, tokenizer), LlavaForConditionalGeneration(config), image_tokens=4)


def idefics(folder) -> Family:
    frame = {"fake": "<fake_token_around_image>", "all": "<global-img>", "end": "<end_of_utterance>"}
    tokenizer = tiny_tokenizer(image_token="<image>", **frame)
    eye = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    processor = Idefics3Processor(
        image_processor=eye, tokenizer=tokenizer, image_seq_len=1, chat_template=IN_PARTS.replace("IMAGE", "<image>")
    )
    config = Idefics3Config(
        text_config=LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **SIZES),
        vision_config=EYES,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return Family(seeing_of(processor, tokenizer), Idefics3ForConditionalGeneration(config), image_tokens=4)


@pytest.fixture(scope="module", params=[gemma, llava, idefics], ids=lambda make: make.__name__)
def family(request, tmp_path_factory):
    torch.manual_seed(0)
    return request.param(tmp_path_factory.mktemp("model"))


def batch_of(family: Family, *names: str) -> dict[str, Any]:
    return collate([encode(EXAMPLES[name], family.seeing) for name in names], family.seeing)


def test_words_are_learnt_and_images_are_not(family):
    batch = batch_of(family, *EXAMPLES)
    for row, name in zip(batch["labels"], EXAMPLES, strict=True):
        assert family.seeing.tokenizer.decode(row[row != IGNORED]) == LEARNT[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_inputs_are_those_of_the_processor(family, name):
    """Where the text is one that the processor can be given whole."""
    seeing, batch = family.seeing, batch_of(family, name)
    plain = seeing.tokenizer.decode(encode(EXAMPLES[name], seeing).input_ids)
    images = [opened(one) for one in EXAMPLES[name].images]
    whole = seeing.processor(
        text=[plain], images=[images] if images else None, return_tensors="pt", add_special_tokens=False
    )
    assert set(whole) | {"labels"} == set(batch)
    for key, value in whole.items():
        assert torch.equal(batch[key], value), key


def test_an_example_scores_the_same_in_any_batch(family):
    names = list(EXAMPLES)
    model = family.model.eval()
    with torch.no_grad():
        together = batch_of(family, *names)
        logits = model(**together).logits
        for number, name in enumerate(names):
            alone = batch_of(family, name)
            length = alone["input_ids"].shape[1]
            found = model(**alone).logits[0]
            torch.testing.assert_close(logits[number, :length], found, rtol=1e-4, atol=1e-4)


def test_an_image_takes_its_tokens_and_another_image_answers_otherwise(family):
    seen, other = (Completion("What?", "red", (picture,)) for picture in (RED, BLUE))
    size = len(encode(seen, family.seeing).input_ids)
    batches = [collate([encode(one, family.seeing)], family.seeing) for one in (seen, other)]
    around = len(family.seeing.mark) - len(family.seeing.token)
    assert batches[0]["input_ids"].shape[1] >= size - 1 + family.image_tokens - around
    with torch.no_grad():
        first, second = (family.model.eval()(**one).logits[0, -1] for one in batches)
    assert not torch.allclose(first, second)


def test_the_lora_is_on_the_text_part(family):
    model = attach_lora(family.model, rank=2)
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained
    assert all("vision" not in name and "projector" not in name and "connector" not in name for name in trained)
    batch = batch_of(family, *EXAMPLES)
    model.train()(**batch).loss.backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)
    model.unload()


def test_names_mean_the_text_part_and_an_expression_reaches_the_rest(tmp_path):
    save_tiny_gemma(tmp_path, sees=True)

    def adapted(*targets: str) -> set[str]:
        model = attach_lora(AutoModelForImageTextToText.from_pretrained(tmp_path), rank=2, target_modules=targets)
        return {name.partition(".lora_")[0] for name, one in model.named_parameters() if one.requires_grad}

    assert len(adapted("q_proj")) == 2
    assert len(adapted(r".*q_proj")) == 3


def learnt_of(family: Family, example: Any, **options: Any) -> str:
    """What of a batch is learnt, as text."""
    labels = collate([encode(example, family.seeing, **options)], family.seeing)["labels"][0]
    return family.seeing.tokenizer.decode(labels[labels != IGNORED])


def test_length_is_counted_in_words_and_images_go_with_the_end(family):
    example = EXAMPLES["two images in their places"]
    whole = encode(example, family.seeing)
    size = len(whole.input_ids)
    assert learnt_of(family, example, max_length=size - 2) == "tw"
    for length in range(1, size + 1):
        encoded = encode(example, family.seeing, max_length=length)
        assert len(encoded.images) == encoded.input_ids.count(family.seeing.token_id)
        batch = collate([encoded], family.seeing)
        assert (batch["labels"] != IGNORED).sum() == encoded.learnt


def test_a_long_text_with_an_image_loses_its_end(family):
    assert learnt_of(family, Text("a long text", (RED,)), max_length=len(family.seeing.mark) + 6).startswith("a lon")
    chat = Chat((*ASKED, Message("user", "so\ufffc"), Message("assistant", "bye")), (RED, BLUE, GREEN))
    size = len(encode(EXAMPLES["a conversation"], family.seeing).input_ids)
    assert learnt_of(family, chat, max_length=size) == "ok<eos>yes<eos>"


@pytest.mark.parametrize(
    "text", ["<image>aa<image>a<image>a<image>b", "a<image>", "<image><image>b", "ab\n<image>\ncd"]
)
def test_words_between_images_are_learnt(family, text):
    count = text.count("<image>")
    found = learnt_of(family, Text(text, (RED, BLUE, GREEN, RED)[:count]))
    # A newline may be one token with what frames an image.
    assert found.replace("\n", "").replace("<unk>", "") == text.replace("<image>", "").replace("\n", "") + "<eos>"


def test_what_is_not_learnt_need_not_be_told_apart(family):
    """Whatever else a processor writes around images."""
    unknown = replace(family.seeing, frame=frozenset())
    example = EXAMPLES["two images in their places"]
    batch = collate([encode(example, unknown)], unknown)
    assert torch.equal(batch["labels"], collate([encode(example, family.seeing)], family.seeing)["labels"])
    with pytest.raises(DataError, match="cannot be told from them"):
        collate([encode(example, unknown, completion_only=False)], unknown)


def test_a_token_for_the_beginning_stands_before_everything(family):
    """As in Gemma's and Llama's tokenizers."""
    tokenizer = copy.deepcopy(family.seeing.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", bos)])
    seeing = replace(family.seeing, tokenizer=tokenizer)
    plain = collate([encode(EXAMPLES["one image"], family.seeing)], family.seeing)
    batch = collate([encode(EXAMPLES["one image"], seeing)], seeing)
    assert batch["input_ids"][0].tolist() == [bos, *plain["input_ids"][0].tolist()]
    assert batch["labels"][0].tolist() == [IGNORED, *plain["labels"][0].tolist()]
    assert {batch[name].shape for name in batch if name.endswith(("ids", "mask")) and batch[name].ndim == 2} == {
        batch["input_ids"].shape
    }


def test_a_question_about_an_image_is_not_cut(family):
    question = Choice("Which?", ("red", "blue"), 0, (RED,))
    rows = rows_of([question], family.seeing, task="image-text-to-text")
    assert [row.encoded.images for row in rows] == [(RED,), (RED,)]
    with pytest.raises(DataError, match=r"the image at its beginning cannot be cut off: give --max-length \d+"):
        rows_of([question], family.seeing, task="image-text-to-text", max_length=5)


def test_prompts_are_learnt_if_asked_for_but_images_are_not(family):
    encoded = encode(EXAMPLES["one image"], family.seeing, completion_only=False)
    batch = collate([encoded], family.seeing)
    learnt = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert family.seeing.tokenizer.decode(learnt).endswith("What?red<eos>")
    assert family.seeing.tokenizer.convert_tokens_to_ids(family.seeing.token) not in learnt.tolist()


MISPLACED = {
    "in a text without images": lambda token: Completion(f"a {token} tag", "b"),
    "in what is to be learnt": lambda token: Completion("a", f"{token} b", (RED,)),
    "after the last reply": lambda _: Chat(
        (Message("user", "q"), Message("assistant", "a"), Message("user", "\ufffc")), (RED,)
    ),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_an_image_without_a_place_and_a_place_without_an_image_are_refused(family, name):
    with pytest.raises(DataError, match=r"would be shown \d images and find \d places"):
        encode(MISPLACED[name](family.seeing.token), family.seeing)


def test_a_processor_without_a_template_gets_one_that_shows_images(tmp_path):
    save_tiny_gemma(tmp_path, sees=True)
    seeing = load_seeing(str(tmp_path))
    assert seeing.takes_parts
    pieces = pieces_of(EXAMPLES["a conversation"], seeing)
    assert pieces[0] == ("User: hi<image_starts>\nAssistant:", False)
    assert seeing.processor.chat_template == plain_template("<image_starts>")


def test_a_template_for_texts_alone_is_given_texts(tmp_path):
    save_tiny_gemma(tmp_path, sees=True, template=CHAT_TEMPLATE)
    seeing = load_seeing(str(tmp_path))
    assert not seeing.takes_parts
    assert pieces_of(EXAMPLES["a conversation"], seeing) == [
        ("<|user|>hi<image_starts><eos><|assistant|>", False),
        ("ok<eos>", True),
        ("<|user|><image_starts>and?<eos><|assistant|>", False),
        ("yes<eos>", True),
    ]


def test_a_tokenizer_alone_shows_no_image():
    with pytest.raises(ModelError, match="reads only texts; columns image = '' ignores images"):
        encode(EXAMPLES["one image"], tiny_tokenizer())


def test_a_model_without_a_processor_is_named(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="there are images in the data"):
        load_seeing(str(tmp_path))


def test_a_model_that_has_no_class_for_texts_alone_reads_texts(tmp_path):
    torch.manual_seed(0)
    made = llava(tmp_path)
    made.model.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    assert type(model) is LlavaForConditionalGeneration
    tokenizer = made.seeing.tokenizer
    assert model(**collate([encode(EXAMPLES["no image"], tokenizer)], tokenizer)).loss.isfinite()
