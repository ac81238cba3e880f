from fastapi import APIRouter

router = APIRouter()


def error_body(problem):
    return {"error": problem.to_dict()}
