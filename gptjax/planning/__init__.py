"""Ahead of time: will it fit, how long does it take, which mesh."""

from gptjax.planning.meshes import choose_mesh
from gptjax.planning.planner import Plan, plan, search

__all__ = ["Plan", "choose_mesh", "plan", "search"]
