"""Rewards: the protocol, rewards in JAX, and the bridge to numpy and torch."""

from streamt1_jax.rewards.base import FAILED as FAILED
from streamt1_jax.rewards.base import OK as OK
from streamt1_jax.rewards.base import Failure as Failure
from streamt1_jax.rewards.base import PromptTable as PromptTable
from streamt1_jax.rewards.base import PromptTokens as PromptTokens
from streamt1_jax.rewards.base import Reward as Reward
from streamt1_jax.rewards.base import Verdict as Verdict
from streamt1_jax.rewards.bridge import host_reward as host_reward
from streamt1_jax.rewards.bridge import per_video as per_video
from streamt1_jax.rewards.bridge import torch_reward as torch_reward
from streamt1_jax.rewards.expression import expression_reward as expression_reward
from streamt1_jax.rewards.native import native_long as native_long
from streamt1_jax.rewards.native import native_short as native_short
from streamt1_jax.rewards.published import PublishedRewards as PublishedRewards
from streamt1_jax.rewards.published import load_rewards as load_rewards
from streamt1_jax.rewards.registry import load_reward as load_reward
from streamt1_jax.rewards.registry import resolve as resolve
