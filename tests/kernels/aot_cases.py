"""The specialisations that test_aot.py compiles, one list an op; arguments in the kernel's order."""

from .aot import AMD, NVIDIA, Case


def step_case(variant: str, dtype: str, **changes: object) -> Case:
    tensor = f"*{dtype}"
    arguments = {
        "sample": tensor,
        "eps_uncond": tensor,
        "eps_cond": tensor,
        "eps_neighbour": tensor,
        "similarity_grad": tensor,
        "similarity": "*fp32",
        "noise": tensor,
        "coefficients": "*fp32",
        "prev_sample": tensor,
        "x0_hat": tensor,
        "block_signals": "*fp32",
        "size": "i32:16",
        "blocks": "i32",
        "coefficient_stride": "i32",
        "BLOCK": 1024,
    }
    return Case("guided_step.triton.step_kernel", variant, {**arguments, **changes}, targets=NVIDIA + AMD)


TERMS = ("eps_neighbour", "similarity_grad", "similarity", "noise")
SIGNALS_ARGUMENTS = {
    "block_signals": "*fp32",
    "signals": "*fp32",
    "blocks": "i32",
    "SIGNALS": 4,
    "SUM_BLOCKS": 64,
}
CASES_GUIDED_STEP = [
    *(step_case(f"all terms {dtype}", dtype) for dtype in ("fp32", "fp16", "bf16")),
    step_case("all terms fp16, fp32 gradient", "fp16", similarity_grad="*fp32"),
    step_case("plain guidance fp16", "fp16", **dict.fromkeys(TERMS)),
    step_case("predict_x0 fp16", "fp16", **dict.fromkeys((*TERMS, "prev_sample"))),
    Case("guided_step.triton.signals_kernel", "4 signals", SIGNALS_ARGUMENTS, warps=1, targets=NVIDIA + AMD),
]

CASES_TOP1: list[Case] = []

CASES_NL2: list[Case] = []

CASES = [*CASES_GUIDED_STEP, *CASES_TOP1, *CASES_NL2]
