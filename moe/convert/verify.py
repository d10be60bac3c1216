"""Verify a conversion: plain transformers, in a fresh process without a network, against our model of the same."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moe.convert import ConversionError

LOGITS_TOLERANCE = 1e-5  # of the largest logit, float32
# experts one by one: the grouped product of torch wants widths of 16 bytes, and sums in another order;
# nothing of ours can be imported there, installed or not: what loads is what anybody's transformers loads
_PROGRAM = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moe", "moe_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
try:
    import moe
except ModuleNotFoundError:
    pass
else:
    sys.exit("moe can be imported, so this verifies nothing")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, file, new, has_own_code = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
given = load_file(file)
model, info = AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=torch.float32,
    output_loading_info=True,
    local_files_only=True,
    experts_implementation="eager",
    trust_remote_code=has_own_code,
)
with torch.no_grad():
    logits = model.eval()(input_ids=given["token"]).logits
    start = given["token"][:1, :4]
    mask = torch.ones_like(start)
    greedy = model.generate(
        start, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
print(json.dumps({
    "difference": (logits - given["logits"]).abs().max().item(),
    "largest": given["logits"].abs().max().item(),
    "greedy": greedy[0, 4:].tolist(),
    "keys": sorted(str(key) for name in keys for key in info[name]),
}))
"""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What came out."""

    difference: float  # largest difference of logits over the largest logit
    num_greedy: int  # greedy tokens compared, all equal


def verify_export(
    folder: Path, *, token_BS: Tensor, logits_BSV: Tensor, greedy: list[int], has_own_code: bool = False
) -> Verification:
    """Load a folder in plain transformers and hold it against what our model, its source or its import, computed.

    Args:
        token_BS: int64, at least 4 tokens in the first sequence.
        logits_BSV: of these tokens, float32.
        greedy: what follows the first 4 tokens of the first sequence, each the likeliest.
        has_own_code: run the code in the folder, which export_hf has just written there.

    Raises ConversionError for a tensor that is missing, unexpected or of another shape, for logits that differ by more
    than LOGITS_TOLERANCE, and for another greedy token.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "given.safetensors"
        save_file({"token": token_BS, "logits": logits_BSV.float().contiguous().cpu()}, file)
        answer = subprocess.run(
            [
                sys.executable,
                "-c",
                _PROGRAM,
                str(folder.resolve()),
                str(file),
                str(len(greedy)),
                str(has_own_code),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=temporary,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_MODULES_CACHE": str(Path(temporary) / "modules"),
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )
    if answer.returncode:
        raise ConversionError(f"{folder} does not load in plain transformers: {answer.stderr.strip().splitlines()[-1]}")
    found = json.loads(answer.stdout.strip().splitlines()[-1])
    if found["keys"]:
        raise ConversionError(f"{folder}: transformers found other tensors than it expects: {found['keys'][:3]}")
    difference = found["difference"] / found["largest"]
    if not difference <= LOGITS_TOLERANCE:
        raise ConversionError(f"{folder}: logits in transformers differ by {difference:.1e} of the largest")
    if found["greedy"] != greedy:
        raise ConversionError(f"{folder}: transformers continues with {found['greedy']}, not with {greedy}")
    return Verification(difference=difference, num_greedy=len(greedy))
