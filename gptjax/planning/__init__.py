"""Ahead of time: will it fit, how long does it take, which mesh."""

from gptjax.planning.meshes import choose_mesh, choose_remat
from gptjax.planning.planner import Plan, plan, search

__all__ = ["Plan", "choose_mesh", "choose_remat", "plan", "search"]
