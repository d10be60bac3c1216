"""What a recipe needs before it runs: parameters, operations, memory per rank. Nothing is allocated."""

from moe.plan.memory import MemoryPlan, plan_memory, plan_text

__all__ = ["MemoryPlan", "plan_memory", "plan_text"]
