"""Examples → token ids: the loss is on what is to be learnt, and nothing else."""

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_squeeze.collating import collate
from lora_squeeze.data import Answered, Chat, Choice, Completion, Labelled, Message, Preference, Text
from lora_squeeze.encoding import IGNORED, encode, encode_class, prompt_text
from lora_squeeze.errors import DataError, ModelError
from lora_squeeze.models import PLAIN_TEMPLATE


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Merges ": y" into one token, and sets <bos> before a text and <eos> after it."""
    vocabulary = {token: number for number, token in enumerate(["<bos>", "<eos>", "<unk>", *"abxy: ", ": ", ": y"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(":", " "), (": ", "y")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, [("<bos>", 0), ("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )


def shown(encoded, tokenizer) -> tuple[str, str]:
    """The whole text, and what of it is learnt."""
    learnt = [one for one, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED]
    assert learnt == [label for label in encoded.labels if label != IGNORED]
    assert encoded.learnt == len(learnt)
    return tokenizer.decode(encoded.input_ids), tokenizer.decode(learnt)


SPOKEN = tuple(Message(*turn) for turn in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
TEXTS = {
    "text": (Text("once"), "once<eos>", "once<eos>"),
    "completion": (Completion("2+2=", "4"), "2+2=4<eos>", "4<eos>"),
    "answer": (Answered("2+2=", "4", {}), "2+2=4<eos>", "4<eos>"),
    "choice": (Choice("Who?", ("I", "you"), 1), "Who?\nAnswer: you<eos>", " you<eos>"),
    "chat": (
        Chat((Message("user", "hi"), Message("assistant", "ho"))),
        "<|user|>hi<eos><|assistant|>ho<eos>",
        "ho<eos>",
    ),
    "chat of several turns, which ends with the user": (
        Chat((*SPOKEN, Message("user", "e"))),
        "<|user|>a<eos><|assistant|>b<eos><|user|>c<eos><|assistant|>d<eos>",
        "b<eos>d<eos>",
    ),
    "completion of a conversation": (
        Completion((Message("system", "s"), Message("user", "hi")), "ho"),
        "<|system|>s<eos><|user|>hi<eos><|assistant|>ho<eos>",
        "ho<eos>",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_learnt(name):
    example, text, learnt = TEXTS[name]
    tokenizer = tiny_tokenizer(template=CHAT_TEMPLATE)
    assert shown(encode(example, tokenizer), tokenizer) == (text, learnt)
    assert shown(encode(example, tokenizer, completion_only=False), tokenizer) == (text, text)


def test_a_model_without_a_template_gets_a_plain_one():
    tokenizer = tiny_tokenizer(template=PLAIN_TEMPLATE)
    turns = (Message("user", "hi "), Message("assistant", "ho"), Message("user", "a"), Message("assistant", "b"))
    text, learnt = shown(encode(Chat(turns), tokenizer), tokenizer)
    assert text == "User: hi\nAssistant: ho<eos>\nUser: a\nAssistant: b<eos>"
    assert learnt == " ho<eos> b<eos>"
    assert prompt_text(turns[:1], tokenizer) == "User: hi\nAssistant:"


def test_a_template_that_rewrites_earlier_turns_learns_the_last_one():
    shortens = "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }};{% endfor %}"
    tokenizer = tiny_tokenizer(template=shortens)
    turns = tuple(Message(*turn) for turn in [("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh")])
    with pytest.raises(ModelError, match="template"):
        encode(Chat(turns), tokenizer)  # even the question is rewritten once it is answered
    drops = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }};{% endif %}{% endfor %}"
    tokenizer = tiny_tokenizer(template=drops)
    assert shown(encode(Chat(turns), tokenizer), tokenizer) == ("ab;ef;gh;", "gh;")


def test_special_tokens_stand_at_the_ends_only():
    tokenizer = words_tokenizer()
    encoded = encode(Completion("ab", "x"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["<bos>", "a", "b", "x", "<eos>"]
    assert [label != IGNORED for label in encoded.labels] == [False, False, False, True, True]
    assert tokenizer.convert_ids_to_tokens(encode(Text("ab"), tokenizer).input_ids) == ["<bos>", "a", "b", "<eos>"]


def test_a_completion_is_cut_off_where_the_model_will_begin_it():
    tokenizer = words_tokenizer()
    tokens = lambda prompt, completion: tokenizer.convert_ids_to_tokens(  # noqa: E731
        encode(Completion(prompt, completion), tokenizer).input_ids
    )
    assert tokens("a", ": y") == ["<bos>", "a", ": y", "<eos>"]
    assert tokens("a: ", "y") == ["<bos>", "a", ": ", "y", "<eos>"]  # not ": y", which no prompt ends in


def test_what_is_too_long_loses_its_end():
    tokenizer = tiny_tokenizer()
    assert shown(encode(Completion("12345", "67"), tokenizer, max_length=6), tokenizer) == ("123456", "6")
    assert encode(Completion("12345", "67"), tokenizer, max_length=5).learnt == 0


@pytest.mark.parametrize("example", [Labelled("t", "l"), Preference("p", "c", "r")])
def test_what_is_no_text_to_learn_is_refused(example):
    with pytest.raises(DataError, match="hold no text"):
        encode(example, tiny_tokenizer())


def test_classes_become_numbers():
    tokenizer = tiny_tokenizer()
    encoded = encode_class(Labelled("abcdef", "good"), tokenizer, ("bad", "good"), max_length=4)
    assert encoded["labels"] == 1
    assert len(encoded["input_ids"]) == len(encoded["attention_mask"]) == 4
    with pytest.raises(DataError, match="'fine' is not one of bad, good"):
        encode_class(Labelled("abc", "fine"), tokenizer, ("bad", "good"))


def test_a_batch_is_padded_on_the_right():
    tokenizer = tiny_tokenizer()
    batch = collate([encode(Completion("1", "2"), tokenizer), encode(Text("a"), tokenizer)], tokenizer)
    one, two, a, end = *tokenizer("12a")["input_ids"], tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[one, two, end], [a, end, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, two, end], [a, end, IGNORED]]
    assert batch["labels"].dtype == torch.long
