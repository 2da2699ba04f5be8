"""How large a step is: `batch_identities`, or as many identities as `tokens_per_batch` pay for."""

from omniid.config import StageConfig, TowerConfig


def photos_per_step(config: StageConfig, tower: TowerConfig) -> int:
    """Photos that a step's `tokens_per_batch` pay for; 0 where identities are counted."""
    return config.tokens_per_batch // tower.num_tokens


def identities_per_step(config: StageConfig, tower: TowerConfig) -> float:
    """Identities of a global step, on average where tokens are counted."""
    if not config.tokens_per_batch:
        return config.batch_identities
    return photos_per_step(config, tower) / (sum(config.num_inputs) / 2)


def divisible_size(config: StageConfig, tower: TowerConfig) -> int:
    """What processes and micro-batches share: identities or photos."""
    return photos_per_step(config, tower) if config.tokens_per_batch else config.batch_identities


def split_error(config: StageConfig, tower: TowerConfig, stage: str, num_processes: int, process: str) -> str | None:
    """A sentence where a step cannot be shared out evenly over `num_processes` times its micro-batches, else None."""
    parts, size, high = num_processes * config.accumulation, divisible_size(config, tower), config.num_inputs[1]
    ways = f"{num_processes} {process} x accumulation {config.accumulation}"
    if not config.tokens_per_batch:
        if size % parts == 0:
            return None
        return (
            f"batch_identities {size} is not a multiple of {ways}; "
            f"change one of them, e.g. --set train.{stage}.batch_identities={-(-size // parts) * parts}"
        )
    if size % parts == 0 and size // parts >= high:
        return None
    fitting = max(-(-size // parts), high) * parts * tower.num_tokens
    return (
        f"tokens_per_batch {config.tokens_per_batch} is {size} photos of {tower.num_tokens} tokens, which are not shared out "
        f"over {ways} with {high} photos or more to each; take --tokens-per-batch {fitting}"
    )
