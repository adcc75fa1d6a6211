"""A plan as plain numbers, for files and tables."""

from __future__ import annotations

import json
from typing import Any

from kdrl_mcore.planning.memory import PHASES, engine_share
from kdrl_mcore.planning.plan import Plan
from kdrl_mcore.planning.savings import savings


def summarise(plan: Plan) -> dict[str, Any]:
    """The numbers that `kdrl-plan` prints: seconds, bytes, tokens/s/GPU, GPU-hours, USD."""
    setup, workload = plan.setup, plan.setup.workload
    config, student, teacher = setup.config, setup.student, setup.teacher
    return {
        "student": {"path": config.student.path, "parameters": student.parameters},
        "teacher": None
        if teacher is None
        else {"path": config.teacher.path or config.student.path, "parameters": teacher.parameters}
        if not config.teachers
        else {
            name: {"path": config.teachers[name].path, "parameters": each.parameters} for name, each in setup.teachers.items()
        },
        "cluster": setup.cluster.name,
        "gpus": setup.gpus,
        "server_gpus": setup.engine_gpus,
        "layout": {
            "tensor": student.layout.tensor,
            "pipeline": student.layout.pipeline,
            "context": student.layout.context,
            "expert": student.layout.expert,
            "data": student.layout.data,
        },
        "gpu_memory_utilization": engine_share(setup) if setup.engine is not None else None,
        "responses": setup.trained.responses,
        "prompt_tokens": workload.prompt_tokens,
        "response_tokens": workload.response_tokens,
        "longest_response": workload.longest,
        "correct": workload.correct,
        "seconds": plan.seconds,
        "hidden_seconds": plan.hidden,
        "phases": {phase.name: {"seconds": phase.seconds.total, **phase.seconds} for phase in plan.phases},
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "training_peak_bytes": max(rank.at(phase) for rank in plan.memory for phase in PHASES if phase != "rollout"),
        "memory": {
            rank.name: {"peak_bytes": rank.peak, "capacity_bytes": rank.capacity, "fullest": rank.fullest}
            for rank in plan.memory
        },
        "checkpoint_host_bytes": plan.checkpoint_host_bytes,
        "activation_host_bytes": plan.activation_host_bytes,
        "teacher_host_bytes": plan.teacher_host_bytes,
        "tokens_per_gpu_second": plan.tokens_per_gpu_second,
        "gpu_hours": plan.gpu_hours,
        "usd": plan.cost,
    }


def to_json(plan: Plan) -> bytes:
    """The summary and the saving of each measure, as the content of a JSON file."""
    saved = [
        {"name": each.name, "key": each.key, "on": each.on, "seconds": each.seconds, "bytes": each.bytes}
        for each in savings(plan)
    ]
    return (json.dumps({**summarise(plan), "measures": saved}, indent=1) + "\n").encode()
