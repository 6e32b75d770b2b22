"""Options that several commands share, so that a word means the same everywhere. Names are mlx-lm's."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Model = Annotated[
    str, typer.Option("--model", help="Model folder, run folder, or hub repo id (owner/name).", show_default=False)
]
Images = Annotated[
    list[str],
    typer.Argument(help="Pictures: files, folders (searched recursively), http(s) addresses.", show_default=False),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repo.", show_default=False)]
MlxPath = Annotated[str, typer.Option("--mlx-path", help="Folder to write.", show_default=False)]
AdapterPath = Annotated[
    str | None, typer.Option("--adapter-path", help="Folder of an adapter trained on this model.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there already.")]
UploadRepo = Annotated[
    str | None, typer.Option("--upload-repo", help="Publish the folder to this hub repo.", show_default=False)
]
LoadDtype = Annotated[
    Dtype, typer.Option("--dtype", help="Type to compute in; auto: bfloat16 on a GPU, float32 on a CPU.")
]
Label = Annotated[
    str | None,
    typer.Option("--label", help="Of scenes: shape or colour; of tables: the column of classes.", show_default=False),
]
Templates = Annotated[
    str | None,
    typer.Option(
        "--templates",
        help="Captions with {} for the class, one a line; the name alone if not given.",
        show_default=False,
    ),
]
QBits = Annotated[
    int | None,
    typer.Option("--q-bits", help="Bits a weight: 2, 3, 4, 5, 6 or 8; 4 if not given.", show_default=False),
]
QGroupSize = Annotated[
    int | None,
    typer.Option("--q-group-size", help="Weights that share a scale; 64 if not given.", show_default=False),
]
QMode = Annotated[str, typer.Option("--q-mode", help="affine, mxfp4, mxfp8 or nvfp4.")]
QuantRecipe = Annotated[
    str | None,
    typer.Option(
        "--quant-recipe",
        help="mixed_4_8: 8 bits for embedding, head, first and last block, 4 for the rest.",
        show_default=False,
    ),
]
