"""Fused kernels of amg, each with a plain-torch reference: guided_step, top1_cosine, nl2, near_pairs.

Installed as `amg.kernels`. With the checkout as working directory, diffusers and transformers find this
folder when they look for Hugging Face's package `kernels`: under that name it is empty, so that theirs
counts as absent.
"""

if __name__ != "kernels":
    from .extension import release_threads
    from .guided_step.contract import (
        COEFFICIENTS,
        STEP_COEFFICIENTS,
        GuidedStep,
        PredictX0,
        coefficient_index,
    )
    from .near_pairs.contract import NearPairs
    from .nl2.contract import NL2
    from .ops import (
        encode_panels,
        encode_rows,
        guided_step,
        guided_step_into,
        near_pairs,
        nl2,
        predict_x0,
        top1_cosine,
        topk_cosine,
    )
    from .top1_cosine.contract import Codes, Panels, Top1, TopK

    __all__ = [
        "COEFFICIENTS",
        "NL2",
        "STEP_COEFFICIENTS",
        "Codes",
        "GuidedStep",
        "NearPairs",
        "Panels",
        "PredictX0",
        "Top1",
        "TopK",
        "coefficient_index",
        "encode_panels",
        "encode_rows",
        "guided_step",
        "guided_step_into",
        "near_pairs",
        "nl2",
        "predict_x0",
        "release_threads",
        "top1_cosine",
        "topk_cosine",
    ]
