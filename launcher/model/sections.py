"""The sections of a resolved preset; the comments of ``jobs/base.yaml`` say what each setting does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from launcher.model.fields import (
    Bytes,
    DnsLabel,
    DnsName,
    Fraction,
    FreeText,
    Image,
    LabelKey,
    LabelValue,
    NonNegative,
    NonNegativeFloat,
    ObjectStoreUrl,
    Positive,
    PositiveFloat,
    Section,
    Text,
    VariableName,
    WandbName,
)


class Model(Section):
    source: Literal["hub", "tiny"]
    path: Text
    attn_implementation: Literal["flash_attention_2", "sdpa", "eager"]
    dtype: Literal["bfloat16", "float32"]
    gradient_checkpointing: bool
    use_remove_padding: bool


class RewardFunction(Section):
    path: Text
    name: Text


class Data(Section):
    source: Literal["parquet", "arithmetic"]
    train_files: list[Text]
    val_files: list[Text]
    max_prompt_length: Positive
    max_response_length: Positive
    reward_function: RewardFunction | None


class Training(Section):
    total_steps: Positive
    prompts_per_step: Positive
    responses_per_prompt: Positive
    mini_batch_prompts: Positive
    ppo_epochs: Positive
    micro_batch_size_per_rank: Positive
    use_dynamic_batch: bool
    max_tokens_per_rank: Positive
    learning_rate: NonNegativeFloat
    loss_agg_mode: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ]
    clip_ratio: PositiveFloat
    entropy_coeff: NonNegativeFloat
    use_kl_loss: bool
    kl_loss_coef: NonNegativeFloat
    save_freq: NonNegative
    keep_checkpoints: Positive
    seed: NonNegative


class Rollout(Section):
    name: Literal["vllm", "hf_cpu"]
    tensor_parallel_size: Positive
    gpu_memory_utilization: Fraction
    temperature: PositiveFloat
    top_p: Fraction


class Influence(Section):
    objective: Literal["log_prob_advantage", "log_prob", "training_loss"]
    contrast: Literal["none", "accepted_minus_rejected", "advantage", "mean_ratio"]
    accepted_above: float
    scope: Literal["per_prompt", "batch"]
    hessian: Literal["response", "inverse", "identity", "token"]
    damping: PositiveFloat
    damping_mode: Literal["trace_over_responses", "trace_over_dim"]
    exclude_self: bool
    positions: Literal["response", "all"]
    projection_dim_factor: Positive
    max_hessian_dim: Positive
    max_tokens_per_response: Annotated[int, Field(ge=-1, le=2**31 - 1)]
    modules: Annotated[list[Text], Field(min_length=1)]
    capture: Literal["auto", "fused", "shared", "separate"]
    profile_timing: bool
    seed: NonNegative


class Store(Section):
    scores_dtype: Literal["float32", "float16"]
    columns: list[Literal["token_ids", "log_probs", "advantages"]]


class Hardware(Section):
    device: Literal["cuda", "cpu"]
    nodes: Positive
    ranks_per_node: Positive
    gpu_product: LabelValue | None
    cpus: Positive
    memory: Bytes
    shared_memory: Bytes


class Retry(Section):
    backoff_limit: NonNegative
    backoff_s: NonNegativeFloat
    grace_period_s: Positive
    deadline_s: Positive


class Wandb(Section):
    mode: Literal["online", "offline", "disabled"]
    entity: WandbName | None
    project: WandbName


class Toleration(Section):
    """Kubernetes' own spelling; a toleration has only the keys that it needs, so these may be left out."""

    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: FreeText | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: NonNegative | None = None  # noqa: N815


class Cluster(Section):
    image: Image
    namespace: DnsLabel
    service_account: DnsName
    image_pull_secrets: list[DnsName]
    storage: Literal["claim", "object_store", "ephemeral"]
    claim: DnsName | None
    object_store: ObjectStoreUrl | None
    ephemeral_storage: Bytes | None
    data_claim: DnsName | None
    secret: DnsName
    scheduler: Literal["default", "kai", "kueue", "runai"]
    queue: LabelValue | None
    priority_class: DnsName | None
    preemptible: bool
    node_pools: list[LabelValue]
    node_selector: dict[LabelKey, LabelValue]
    tolerations: list[Toleration]
    environment: dict[VariableName, FreeText]
    extended_resources: dict[LabelKey, Positive]


class Settings(Section):
    """What a preset resolves to."""

    model: Model
    data: Data
    training: Training
    rollout: Rollout
    influence: Influence
    store: Store
    hardware: Hardware
    retry: Retry
    wandb: Wandb
    cluster: Cluster
    verl: dict[str, Any]
