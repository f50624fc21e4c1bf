"""A model in a form that loads back with torch and MLflow alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class ExportError(Exception):
    """The model has no form that loads in plain torch."""


def export(model: Any, example: Any, path: Path, meta: Any) -> None:
    """Save the model as a `torch.export` program (`pt2`): a graph and its weights, no code of ours and no pickle.

    The batch dimension stays free (an example of one row is doubled, for torch.export would fix a 1), all others are
    as in the example. The program is the model in evaluation mode.
    """
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import infer_signature

    if example is None:
        raise ExportError("no example of its input; its weights are in model.safetensors")
    try:
        batch = torch.as_tensor(example).detach().cpu().numpy()
        rows = np.resize(batch, (2, *batch.shape[1:]))
        model = model.cpu().eval()
        with torch.no_grad():
            out = model(torch.from_numpy(rows))
        mlflow.pytorch.save_model(
            model,
            str(path),
            mlflow_model=meta,
            signature=infer_signature(rows, out.numpy() if isinstance(out, torch.Tensor) else None),
            input_example=rows,
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
            serialization_format="pt2",
        )
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ExportError(f"torch.export cannot: {reason}; its weights are in model.safetensors") from error
