"""`streamt1 parity CASE.safetensors`: replay a recorded PyTorch run and compare every number with it.

A case is a safetensors file, in most kinds with a JSON file of its sizes beside it; weights have the names of the
published checkpoints after a prefix (`dit.model.`, `vae.`, `t5.`). The kind is known by what the files hold:

- a Stream-T1 run (JSON: `config`, `dit`, `vae`, `latent_height`, `latent_width`, `rewards` in words, `candidates` in
  the order tried, `history_seeds`, `final_scores`; tensors: `prompt_embeds`, `denoising_steps_warped`, `seeds` with the
  `noise` and `renoise` of each, `beam{i}.latents` best first, `beam{i}.video` where recorded);
- a LongLive run with prompt switches (JSON: `dit`, `local`, `sink`, `steps`, `chunks`, `switch_frames`, `global_sink`;
  tensors: a row of `prompt_embeds` a prompt, `noise` of all frames, `renoise` of every chunk, `latents`);
- one forward with a LoRA (`base.`, `lora.`, `merged.`, `x`, `timestep`, `flow`, `x0`, `kv{layer}.k/v`);
- the VAE (`pixels` to `encoded`, `latents` to `video`); the text encoder (`ids`, `mask` to `hidden`, `prompt_embeds`).

All arithmetic is float32; no torch is needed but for a folder of the reward models.
"""

from pathlib import Path

import jax

from streamt1_jax.errors import BadInputError
from streamt1_jax.recorded_case import Comparison, read_case


def replay(path: str | Path) -> list[Comparison]:
    """Replays one case: a file, or a folder of the reward models (`parity_rewards.py`).

    Raises:
        BadInputError: not a case of a known kind.
        WeightsError: its weights do not fit its sizes.
    """
    if Path(path).is_dir():
        from streamt1_jax.parity_rewards import replay_rewards

        return replay_rewards(path)
    from streamt1_jax.parity_networks import replay_lora, replay_umt5, replay_vae
    from streamt1_jax.parity_search import replay_search
    from streamt1_jax.parity_switch import replay_switches

    tensors, sizes = read_case(Path(path))
    for key, kind in (("candidates", replay_search), ("switch_frames", replay_switches), ("rank", replay_lora)):
        if key in sizes:
            return list(kind(tensors, sizes))
    for key, kind in (("video_unclamped", replay_vae), ("hidden", replay_umt5)):
        if key in tensors:
            return list(kind(tensors))
    raise BadInputError(
        f"{path} holds {sorted({key.split('.')[0] for key in tensors})}, expected a recorded run of "
        "Stream-T1 or LongLive, LoRA, VAE or text encoder: the format is described in streamt1_jax/parity.py; "
        "keep the .json file beside it"
    )


def run_parity(path: str) -> int:
    """Prints the table; returns 0 if everything matches, else 1."""
    with jax.default_matmul_precision("highest"):
        comparisons = replay(path)
    width = max(len(c.quantity) for c in comparisons)
    print(f"{'quantity':{width}}  {'compared':>9}  {'error':>9}  {'tolerance':>9}")
    for c in comparisons:
        verdict = "ok" if c.matches else "MISMATCH"
        print(f"{c.quantity:{width}}  {c.count:9d}  {c.error:9.2e}  {c.tolerance:9.2e}  {verdict}")
    wrong = sum(not c.matches for c in comparisons)
    print(f"{len(comparisons) - wrong} of {len(comparisons)} quantities match")
    return 1 if wrong else 0
