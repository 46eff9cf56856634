"""The types of single settings, shared by the sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A mapping of settings: strict types, no unknown keys, no defaults (``jobs/base.yaml`` has them)."""

    # A section is built when it is first used: most commands check one schema that holds others.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


def _writable(text: str) -> str:
    """Refuse what no YAML document, environment variable or file name can hold."""
    if "\x00" in text:
        raise PydanticCustomError("text", "must not contain a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise PydanticCustomError("text", "must not contain half of a surrogate pair")
    return text


def _matching(pattern: str, what: str) -> AfterValidator:
    import re

    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise PydanticCustomError("text", "must be {what}", {"what": what})
        return text

    return AfterValidator(check)


FreeText = Annotated[str, AfterValidator(_writable)]
Text = Annotated[FreeText, Field(min_length=1)]

#: RFC 1123 label or subdomain, as Kubernetes names its objects.
DnsLabel = Annotated[
    str,
    _matching(r"(?=.{1,63}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?", "lower-case letters, digits and '-', at most 63"),
]
DnsName = Annotated[
    str,
    _matching(
        r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*",
        "lower-case letters, digits, '-' and '.', at most 253",
    ),
]
LabelValue = Annotated[
    str,
    _matching(
        r"(?=.{1,63}$)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?",
        "a Kubernetes label value, such as NVIDIA-H200",
    ),
]
#: A Kubernetes quantity of bytes, in no more digits than ``influence.machine.parse_bytes`` takes.
Bytes = Annotated[
    str,
    _matching(
        r"[1-9][0-9]{0,17}(\.[0-9]{1,9})?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?",
        "a number of bytes with a unit, such as 1500Gi",
    ),
]


def _image_reference(text: str) -> str:
    from launcher.image_reference import EXAMPLE, ImageReference

    try:
        ImageReference.parse(text)
    except ValueError:
        what = f"an image reference, such as {EXAMPLE} (with all 64 digits); names have no capitals"
        raise PydanticCustomError("text", "must be {what}", {"what": what}) from None
    return text


Image = Annotated[str, AfterValidator(_image_reference)]

#: The key of a taint: a label's name, with or without a DNS name in front.
LabelKey = Annotated[
    str,
    _matching(
        r"(?=[^/]{1,253}/|[^/]*$)([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
        r"(?=[^/]{1,63}$)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?",
        "a Kubernetes label key, such as nvidia.com/gpu",
    ),
]
#: An environment variable; those that the run sets itself are refused by a rule.
VariableName = Annotated[str, _matching(r"[A-Za-z_][A-Za-z0-9_]{0,127}", "an environment variable's name")]
ObjectStoreUrl = Annotated[
    str,
    _matching(
        r"(s3|gs|az)://[a-z0-9][a-z0-9._-]{1,62}(/[A-Za-z0-9._=-]+)*/?",
        "an object store's folder, such as s3://bucket/influence",
    ),
]
#: A part of W&B's paths.
WandbName = Annotated[
    str,
    _matching(
        r"[^/\\#?%:\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,128}",
        "a name in W&B: at most 128 characters, without / \\ # ? % :",
    ),
]

# Kubernetes and numpy keep some of the counts in 32 bits.
_MAX_INT = 2**31 - 1
Positive = Annotated[int, Field(ge=1, le=_MAX_INT)]
NonNegative = Annotated[int, Field(ge=0, le=_MAX_INT)]
Fraction = Annotated[float, Field(gt=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
