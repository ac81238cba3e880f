"""Routes of this protocol."""

from typing import Any

from fastapi import APIRouter

from imprompt.app.server.problems import Problem

router = APIRouter()


def error_body(problem: Problem) -> dict[str, Any]:
    """An error as this protocol shows it."""
    return {"error": problem.to_dict()}
