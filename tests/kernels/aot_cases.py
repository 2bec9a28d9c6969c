"""The specialisations that test_aot.py compiles, one list an op; arguments in the kernel's order."""

import importlib

from .aot import AMD, NVIDIA, Case, why_not


def step_case(
    variant: str,
    dtype: str,
    network: str | None = None,
    targets: tuple[str, ...] = NVIDIA + AMD,
    **changes: object,
) -> Case:
    tensor, output = f"*{dtype}", f"*{network or dtype}"
    arguments = {
        "sample": tensor,
        "eps_uncond": output,
        "eps_cond": output,
        "eps_neighbour": output,
        "similarity_grad": output,
        "similarity": "*fp32",
        "noise": tensor,
        "coefficients": "*fp32",
        "rows": None,
        "state": None,
        "output_scale": None,
        "prev_sample": tensor,
        "x0_hat": tensor,
        "sums": "*fp32",
        "flags": None,
        "size": "i32:16",
        **dict.fromkeys(("uncond_rows", "cond_rows", "neighbour_rows", "grad_rows"), "i32"),
        **dict.fromkeys(("batches", "programs", "coefficient_stride"), "i32"),
        "WIDE": False,
        "STATES": 0,
        "SUMS": 4,
        "BLOCK": 2048,
    }
    arguments |= changes
    warps = arguments["BLOCK"] // (256 if arguments["STATES"] else 512)
    return Case("guided_step.triton.step_kernel", variant, arguments, warps=warps, targets=targets)


TERMS = ("eps_neighbour", "similarity_grad", "similarity", "noise")
ENGINE = {"rows": "*i32", "output_scale": "*fp32", "WIDE": True}


def with_states(count: int) -> dict[str, object]:
    """What an engine's step has with this many states."""
    return {**ENGINE, "STATES": count, "state": "*fp32" if count else None}


def whole_with_states(count: int) -> dict[str, object]:
    """The same where a program takes a whole sample and sets its flag."""
    return {**with_states(count), "BLOCK": 4096 if count else 8192, "flags": "*i32"}


SIGNALS_ARGUMENTS = {
    "sums": "*fp32",
    "signals": "*fp32",
    "flags": None,
    "programs": "i32",
    "SIGNALS": 4,
    "SUM_PROGRAMS": 64,
}
CASES_GUIDED_STEP = [
    *(step_case(f"all terms {dtype}", dtype) for dtype in ("fp32", "fp16", "bf16")),
    step_case("all terms fp16, fp32 gradient", "fp16", similarity_grad="*fp32"),
    step_case("plain guidance fp16", "fp16", **dict.fromkeys(TERMS)),
    *(step_case(f"all terms {dtype}, whole samples", dtype, BLOCK=8192) for dtype in ("fp32", "fp16")),
    step_case("plain guidance fp16, whole samples", "fp16", **dict.fromkeys(TERMS), BLOCK=8192),
    step_case(
        "predict_x0 fp16, whole samples",
        "fp16",
        **dict.fromkeys((*TERMS, "prev_sample")),
        SUMS=3,
        BLOCK=8192,
    ),
    *(step_case(f"engine fp16, {count} states", "fp16", **with_states(count)) for count in range(4)),
    step_case("engine fp32 beside fp16, 2 states", "fp32", "fp16", **with_states(2)),
    *(  # on gfx942 up to 11 scalar registers are spilled here
        step_case(
            f"engine {dtype}, {count} states, whole samples", dtype, None, NVIDIA, **whole_with_states(count)
        )
        for dtype, count in (("fp16", 2), ("fp16", 3), ("fp32", 3))
    ),
    step_case("engine fp16, 0 states, whole samples", "fp16", **whole_with_states(0)),
    Case("guided_step.triton.signals_kernel", "4 signals", SIGNALS_ARGUMENTS, warps=1, targets=NVIDIA + AMD),
    Case(
        "guided_step.triton.signals_kernel",
        "4 signals and flags",
        SIGNALS_ARGUMENTS | {"flags": "*i32"},
        warps=1,
        targets=NVIDIA + AMD,
    ),
]


def score_function(module: str, name: str) -> object:
    """Return the jit function that a search kernel takes as a constant; None where nothing is compiled."""
    return None if why_not() else getattr(importlib.import_module(f"amg.kernels.{module}"), name)


def screening_tiles(queries: str, block_queries: int) -> dict[str, object]:
    """The tile sizes that the launchers choose: 128 bytes of each row a step."""
    block_k = {"*i8": 128, "*fp16": 64, "*bf16": 64, "*fp32": 32}[queries]
    return {"BLOCK_ROWS": 128, "BLOCK_QUERIES": block_queries, "BLOCK_K": block_k}


def cosine_case(rows: str, block_queries: int) -> Case:
    coded = rows == "*i8"
    arguments = {
        "rows": rows,
        **dict.fromkeys(("scales", "errors"), "*fp32" if coded else None),
        "queries": rows,
        **dict.fromkeys(("query_scales", "losses", "floor", "lower", "upper"), "*fp32"),
        "count": "i32",
        "dimension": "i32:16",
        "stride": "i32:16",
        "batch": "i32",
        "blocks": "i32",
        **screening_tiles(rows, block_queries),
    }
    variant = f"{'codes' if coded else rows[1:]}, {block_queries} queries"
    return Case("top1_cosine.triton.screen_blocks", variant, arguments, warps=4 if block_queries < 32 else 8)


def distance_case(rows: str, block_queries: int) -> Case:
    queries = "*i8" if rows == "*u8" else rows
    arguments = {
        "rows": rows,
        "queries": queries,
        "query_squares": "*i32" if rows == "*u8" else "*fp32",
        **dict.fromkeys(("losses", "floor", "lower", "upper"), "*fp32"),
        **dict.fromkeys(("unit", "error"), "fp32"),
        "count": "i32",
        "pixels": "i32:16",
        "stride": "i32:16",
        **dict.fromkeys(("padded_batch", "batch", "blocks"), "i32"),
        "SEGMENT": 2**15 if rows == "*u8" else 2**11,
        **screening_tiles(queries, block_queries),
    }
    return Case(
        "nl2.triton.screen_blocks",
        f"{rows[1:]}, {block_queries} queries",
        arguments,
        warps=4 if block_queries < 32 else 8,
    )


def queries_case(encoded: str) -> Case:
    arguments = {
        "queries": "*fp32",
        "encoded": encoded,
        **dict.fromkeys(("scales", "losses"), "*fp32"),
        "norms": "*fp64",
        "floor": "*fp32",
        "batch": "i32",
        **dict.fromkeys(("dimension", "stride"), "i32:16"),
        **dict.fromkeys(("dot_error", "norm_error"), "fp32"),
        "BLOCK_K": 512,
        "CODE_MAX": 127,
    }
    return Case("top1_cosine.triton.encode_queries", f"fp32 to {encoded[1:]}", arguments)


def encode_case(rows: str) -> Case:
    arguments = {
        "rows": rows,
        "codes": "*i8",
        "scales": "*fp32",
        "errors": "*fp64",
        "count": "i32",
        "dimension": "i32:16",
        "ROWS": 16,
        "BLOCK_K": 128,
        "CODE_MAX": 127,
    }
    return Case("top1_cosine.triton.encode_blocks", rows[1:], arguments)


def exact_arguments(rows: str, score: object, own: dict[str, object]) -> dict[str, object]:
    """Arguments of the kernels that score rows exactly; `own` is what only one of them has."""
    return {
        "rows": rows,
        "queries": "*fp64" if rows == "*u8" else "*fp32",
        "norms": None if rows == "*u8" else "*fp64",
        **own,
        "SCORE": score,
        "BLOCK_ROWS": 128,
        "ROWS": 16,
        "BLOCK_K": 128,
    }


def best_case(rows: str) -> Case:
    own = {
        **dict.fromkeys(("floor", "upper", "scores"), "*fp32"),
        "best_rows": "*i64",
        "count": "i32",
        "dimension": "i32:16",
        "batch": "i32",
        "blocks": "i32",
    }
    score = score_function("top1_cosine.triton", "exact_similarity")
    arguments = {**exact_arguments(rows, score, own), "ROWS": 8, "BLOCK_K": 256, "CHUNK": 1024}
    return Case("search.triton.best_in_blocks", f"cosine {rows[1:]}", arguments)


def list_case(variant: str, rows: str, score: object, kept: int) -> Case:
    own = {
        "floor": "*fp32",
        **dict.fromkeys(("listed", "number"), "*i32"),
        "scores": "*fp32",
        "best_rows": "*i64",
        **dict.fromkeys(("k", "shares", "count"), "i32"),
        "dimension": "i32:16",
        "blocks": "i32",
    }
    arguments = {**exact_arguments(rows, score, own), "KEPT": kept}
    return Case("search.triton.best_in_list", f"{variant}, {kept} kept", arguments)


LIST_ARGUMENTS = {
    **dict.fromkeys(("upper", "floor"), "*fp32"),
    **dict.fromkeys(("listed", "number"), "*i32"),
    "blocks": "i32",
    "CHUNK": 2048,
}
SHARES_ARGUMENTS = {
    "scores": "*fp32",
    "best_rows": "*i64",
    "score": "*fp32",
    "row": "*i64",
    **dict.fromkeys(("batch", "shares"), "i32"),
    "CHUNK": 1024,
}
CASES_TOP1 = [
    *(queries_case(encoded) for encoded in ("*fp32", "*fp16", "*bf16", "*i8")),
    *(cosine_case(rows, 16) for rows in ("*fp32", "*fp16", "*bf16", "*i8")),
    *(cosine_case(rows, 64) for rows in ("*fp32", "*fp16", "*i8")),
    Case("search.triton.list_blocks", "any", LIST_ARGUMENTS, wide=False),  # rows of it start anywhere
    *(best_case(rows) for rows in ("*fp32", "*fp16")),
    Case("search.triton.best_of_shares", "any", SHARES_ARGUMENTS, wide=False),
    *(
        list_case("cosine fp16", "*fp16", score_function("top1_cosine.triton", "exact_similarity"), kept)
        for kept in (16, 1024)
    ),
    *(encode_case(rows) for rows in ("*fp32", "*fp16")),
]
CASES_NL2 = [
    *(distance_case(rows, 16) for rows in ("*u8", "*fp32", "*fp16", "*bf16")),
    *(distance_case(rows, 64) for rows in ("*u8", "*fp32", "*fp16")),
    list_case("nl2 u8", "*u8", score_function("nl2.triton", "exact_closeness"), 64),
]

CASES = [*CASES_GUIDED_STEP, *CASES_TOP1, *CASES_NL2]
