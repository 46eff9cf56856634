"""A tokenizer for the additions: one token a digit, a sign or a word, so that its text stays readable.

It is byte-level BPE in Qwen2's manner, because ``AutoTokenizer`` rebuilds a checkpoint of that model type
with Qwen2's own splitting, whatever class saved it.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<|endoftext|>"  # noqa: S105
START_TOKEN = "<|im_start|>"  # noqa: S105
END_TOKEN = "<|im_end|>"  # noqa: S105

_WORDS = ["system", "user", "assistant", "What", "Ġis", "Ġso"]  # Ġ and Ċ: byte-level BPE's blank and line end
_SIGNS = [*"0123456789", *"+=?.,:", "Ġ", "Ċ"]
_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen2's, shortened
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer every time: its vocabulary and merges are lists, nothing is trained."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    # Each word is merged letter by letter from its beginning: W+h, Wh+a, Wha+t.
    prefixes = {word: list(accumulate(word)) for word in _WORDS}
    merges = [(shorter, longer[-1]) for word in _WORDS for shorter, longer in pairwise(prefixes[word])]
    letters = sorted({letter for word in _WORDS for letter in word} - set(_SIGNS))
    longer = [prefix for word in _WORDS for prefix in prefixes[word][1:]]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*_SIGNS, *letters, *longer]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=[START_TOKEN],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
