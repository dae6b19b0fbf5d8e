"""`python -m benchmarks.model_speed`: PAS-Net, ECO-Lite and I3D side by side, forward and training, CPU or GPU.

Needs torch alone, no videos: clips are random. The reference is the plain form, module by module, fp32, eager, maps in
torch's usual order; `--reference` only checks that the fast form agrees with it. Peers alternate in an order drawn for
every round, medians are reported, and a ratio is one of samples of the same round. Utilisation is the share of this
machine's own rate of large matrix products in the form's precision (of the same run): above 1 where Fourier tiles leave
out multiplications that the count includes.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import datetime
import gc
import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pasnet.config import FUSION_TITLES, FusionConfig, ModelConfig
from pasnet.machine import family, hardware
from pasnet.models.cost import cost
from pasnet.models.fast import has_fast_bf16, optimised
from pasnet.models.pasnet import PASNet, build, compiled, for_tensor_cores
from pasnet.provenance import commit

RESULTS = Path(__file__).parent / "results"
STYLE = "A+pool(I)+pool(F)"
FRAMES = 128  # of a large batch on a GPU
QUIET, TRIES = 0.1, 3  # a sample in which others used more of the machine than this is taken again, so often at most
BOUND_AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}
TIMES_AS_FAR = 1.5  # from fp64, that the fast form's gradients may be, where rounding decides
NEEDED = ("logits", "gradients in fp64", "smooth gradients", "compiled gradients")  # must agree, else exit code 1


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, prints the tables and writes JSON; exit code 1 where the forms
    disagree beyond what rounding explains."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_speed", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="width 1/8, 64 px: shows that it runs, says nothing")
    parser.add_argument("--reference", action="store_true", help="only check the fast form against the reference")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    bench = Bench(torch.device(arguments.device), arguments.rounds, arguments.quick)
    kind = family(hardware()) if arguments.device == "cpu" else hardware().lower().replace(" ", "-")
    path = arguments.out / f"model-speed-{kind}{'-quick' if arguments.quick else ''}.json"

    def save(content: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    content = bench.agreement() if arguments.reference else bench.everything(save)
    report(content)
    if not arguments.reference:
        print(path)
    needed = [row for row in content["tables"]["agreement"] if row["what"].startswith(NEEDED)]
    sys.exit(0 if all(row["agrees"] for row in needed) else 1)


class Bench:
    """All measurements on one device. `quick` shrinks the networks and frames so that a test can run it."""

    def __init__(self, device: torch.device, rounds: int, quick: bool) -> None:
        self.device, self.rounds, self.quick = device, 1 if quick else rounds, quick
        self.gpu = device.type == "cuda"
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; TF32 would miss the agreement of 1e-4
        self.width, self.size = (0.125, 64) if quick else (1.0, 224)
        self.bf16 = has_fast_bf16(device)
        self.rates: dict[str, float] = {}
        self.ratios: dict[str, float] = {}  # of the reference's time to a form's, one clip of K = 8
        self.also: list[dict[str, Any]] = []  # agreement of what was compiled
        self.others: list[float] = []  # share of the machine that other processes used, in every sample that counts
        self.not_run: dict[str, str] = {} if self.bf16 else {"bf16": "not in this processor's hardware"}

    # ---- what is run ----

    def network(self, style: str, width: float | None = None) -> PASNet:
        """The reference, in eval mode, with BN statistics of its own (fresh ones would make folding a no-op)."""
        torch.manual_seed(0)
        with self.device:
            net = PASNet(ModelConfig(num_classes=101, width=width or self.width, fusion=FusionConfig(style=style)))
        with torch.no_grad():
            net.train()(self.clips(2, 2, 64))
        return net.eval()

    def clips(self, batch: int, k: int, size: int | None = None) -> Tensor:
        """Random uint8 clips (batch,K,3,size,size)."""
        generator = torch.Generator().manual_seed(1)
        shape = (batch, k, 3, size or self.size, size or self.size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(self.device)

    def forms(self, net: nn.Module) -> dict[str, nn.Module]:
        """The reference and the fast forms of a network that this device can run."""
        if not isinstance(net, PASNet):  # I3D: channels-last and autocast is what there is
            last = copy.deepcopy(net).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
            return {"reference": net, "fp32": last} | ({"bf16": Autocast(last, self.device)} if self.bf16 else {})
        found: dict[str, nn.Module] = {"reference": net, "fp32": optimised(net)}
        if self.bf16:
            found["bf16"] = optimised(net, "bf16")
        return found

    def compiled(self, net: nn.Module) -> nn.Module:
        """The form for a GPU that serves one shape of batch for long: torch.compile with CUDA graphs."""
        torch.compiler.reset()
        if isinstance(net, PASNet):
            return optimised(net, "bf16", compiled=True)
        last = copy.deepcopy(net).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return torch.compile(Autocast(last, self.device), mode="reduce-overhead", dynamic=False)  # type: ignore[return-value]

    # ---- how it is measured ----

    def alternate(
        self, peers: Mapping[str, Callable[[], object]], rounds: int | None = None, of: str = ""
    ) -> dict[str, list[float]]:
        """Seconds of every peer in every round, after one run to warm up. One that raises is left out, with why, under
        its name and whose form it is.

        Of a sample that other processes disturbed, more are taken, and the least disturbed counts.
        """
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for number in range(-1, rounds or self.rounds):
            names = [name for name in peers if name in seconds]
            random.Random(number).shuffle(names)
            for name in names:
                try:
                    tried: list[tuple[float, float]] = []  # share of others, seconds
                    while not tried or (number >= 0 and tried[-1][0] > QUIET and len(tried) < TRIES):
                        self.wait()
                        busy, own, started = _busy_seconds(), time.process_time(), time.perf_counter()
                        peers[name]()
                        self.wait()
                        taken = time.perf_counter() - started
                        others = _busy_seconds() - busy - (time.process_time() - own)
                        tried.append((max(0.0, others) / taken / (os.cpu_count() or 1), taken))
                    if number >= 0:
                        seconds[name].append(min(tried)[1])
                        self.others.append(min(tried)[0])
                except (RuntimeError, MemoryError) as error:
                    self.not_run[f"{of}{name}"] = str(error).splitlines()[0][:200]
                    del seconds[name]
                    gc.collect()
        return seconds

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize()

    def peak(self, work: Callable[[], object]) -> float:
        """Peak memory in MB while `work` runs: a GPU's allocations, or this process's resident pages above before."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            work()
            self.wait()
            return round(torch.cuda.max_memory_allocated() / 1e6, 1)
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else freed pages that stay with the process hide what is taken
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak that VmHWM reports
            before = _status("VmRSS")
            work()
            return round((_status("VmHWM") - before) / 1e3, 1)
        except (OSError, AttributeError):
            work()
            return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)

    def matmul_rates(self) -> None:
        """10^9 multiply-adds per second of large matrix products, by precision: what `utilisation` is a share of.

        The best of all calls counts: other work may sit on the machine for all of one.
        """
        n = 1024 if self.quick else 8192 if self.gpu else 4096  # long enough to see whether others disturb
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if name == "bf16" and not self.bf16:
                continue
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            taken = self.alternate({"matmul": lambda a=a, b=b: a @ b}, 5)["matmul"]  # type: ignore[misc]
            self.rates[name] = max(self.rates.get(name, 0.0), round(n**3 / min(taken) / 1e9, 1))

    # ---- the tables ----

    def everything(self, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """All tables, with the hardware they come from; `save` gets what there is after each of them."""
        load = os.getloadavg()[0]
        content: dict[str, Any] = {"date": datetime.date.today().isoformat(), "hardware": hardware()}
        content |= {"commit": commit(), "torch": torch.__version__, "python": platform.python_version()}
        content |= {"threads": torch.get_num_threads(), "rounds": self.rounds, "tables": {}}
        if self.gpu:
            content["cudnn"] = torch.backends.cudnn.version()
        tables = content["tables"]
        self.matmul_rates()  # and after every table: the best counts
        for title, table in (
            ("agreement", lambda: self.agreement()["tables"]["agreement"]),
            ("training", self.training),
            ("forward", self.forward),
            ("styles", self.styles),
            ("memory", self.memory),
        ):
            tables[title] = table()
            tables["agreement"] += self.also
            self.also = []
            self.finish(content, load)
            save(content)
        return content

    def finish(self, content: dict[str, Any], load: float) -> None:
        """Utilisations, bounds and circumstances, as far as the tables go."""
        self.matmul_rates()
        tables = content["tables"]
        forward, training, styles = (tables.get(title, []) for title in ("forward", "training", "styles"))
        for row in [*forward, *training]:
            if "not_run" not in row:
                rate = self.rates["bf16" if "bf16" in row["form"] else "fp32"]
                row["utilisation"] = round(row["gmac_per_second"] / rate, 3)
        content["gmac_per_second_of_matmul"] = self.rates
        content["bounds"] = self.gpu_bounds(forward, training) if self.gpu else self.cpu_bounds(styles)
        content["not_run"] = self.not_run
        quantiles = statistics.quantiles(self.others, n=10)
        content["others_share_of_samples"] = {"median": round(quantiles[4], 3), "ninth decile": round(quantiles[8], 3)}
        content["load_before_and_after"] = [round(load, 2), round(os.getloadavg()[0], 2)]

    def cpu_bounds(self, styles: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What issue 4 asks of a CPU."""
        worst = min((row["times_faster"] for row in styles if row["form"] == "fp32"), default=None)
        return [
            _bound("fast fp32 >= 1.5x the reference, K = 8, width 1", self.ratios.get("fp32"), 1.5),
            _bound("fast bf16 >= 1.5x the reference, K = 8, width 1", self.ratios.get("bf16"), 1.5),
            _bound("fast fp32 no slower than the reference, all styles and widths: the least", worst, 1.0),
        ]

    def gpu_bounds(self, forward: list[dict[str, Any]], training: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What issue 4 asks of a GPU; of each network the best form and batch."""

        def best(rows: list[dict[str, Any]], network: str, k: int, what: str) -> float | None:
            found = [row[what] for row in rows if (row["network"], row.get("num_segments")) == (network, k)
                     and row["form"] in ("bf16", "bf16, compiled")]  # fmt: skip
            return max(found, default=None)

        ours, theirs = (best(forward, *of, "clips_per_second") for of in (("PAS-Net", 32), ("I3D", 64)))
        ratio = round(ours / theirs, 3) if ours and theirs else None
        return [
            _bound("PAS-Net training, bf16, K = 16: >= 45 % of the matrix product's rate",
                   best(training, "PAS-Net", 16, "utilisation"), 0.45),
            _bound("PAS-Net inference, bf16, K = 16: >= 55 % of the matrix product's rate",
                   best(forward, "PAS-Net", 16, "utilisation"), 0.55),
            _bound("PAS-Net-32 >= 3x the clips/s of I3D-64 under autocast (the paper's headline)", ratio, 3.0),
        ]  # fmt: skip

    def agreement(self) -> dict[str, Any]:
        """The largest difference from the reference's logits over the largest logit; and of the training form's
        gradients (bf16: autocast), the norm of the difference over the reference's norm."""
        rows = []
        for style in (STYLE, "A", "Conv(A,E*A)"):
            net = self.network(style)
            clips = self.clips(1, 8)
            with torch.inference_mode():
                expected = net(clips)
                for form, fast in self.forms(net).items():
                    if form != "reference":
                        rows.append({"network": style, "what": "logits", **_agrees(form, _off(fast(clips), expected))})
            # In fp64 both forms must give the same gradients. Below, units whose input is nearly 0 fall on either side
            # of their ReLU, so that gradients differ by about the root of what the maps differ by, in any two forms;
            # but the fast one may not be further from the truth.
            exact = self.gradients(net, torch.float64)
            for form in ("fp32", "layers for bf16") if self.gpu else ("fp32",):
                error = _distance(self.gradients(net, torch.float64, form=form), exact)
                rows.append({"network": style, "what": "gradients in fp64", **_agrees("fp32", error), "form": form})
            plain = self.gradients(net, torch.float32)
            for form in ("fp32", "bf16") if self.bf16 else ("fp32",):
                itself = plain if form == "fp32" else self.gradients(net, torch.float32, autocast=True)
                ours = self.gradients(net, torch.float32, autocast=form == "bf16", form=form)
                own, times = _distance(itself, exact), _distance(ours, exact) / _distance(itself, exact)
                what = f"gradients (the plain form itself is {own:.1e} from fp64)"
                rows.append({"network": style, "what": what, **_agrees(form, _distance(ours, plain))})
                row = {"network": style, "what": "gradients: times as far from fp64 as the plain form's", "form": form}
                rows.append(row | {"error": round(times, 3), "bound": TIMES_AS_FAR, "agrees": times <= TIMES_AS_FAR})
            # What is left where no unit can change sides is the arithmetic of convolutions, norms and fusions
            with Smooth():
                plain = self.gradients(net, torch.float32)
                for form in ("fp32", "bf16") if self.bf16 else ("fp32",):
                    ours = self.gradients(net, torch.float32, autocast=form == "bf16", form=form)
                    row = {"network": style, "what": "smooth gradients"}
                    worst = {"what": "smooth gradients, the worst tensor"}
                    if form == "fp32":
                        rows.append(row | worst | _agrees(form, _worst(ours, plain)))
                    else:
                        itself = self.gradients(net, torch.float32, autocast=True)
                        times = _worst(ours, plain) / _worst(itself, plain)
                        worst["what"] += ": times as far as the plain form's worst"
                        far = {"error": round(times, 3), "bound": TIMES_AS_FAR, "agrees": times <= TIMES_AS_FAR}
                        rows.append(row | worst | {"form": form} | far)
                        row["what"] += f" (the plain form's under autocast: {_distance(itself, plain):.1e})"
                    rows.append(row | _agrees(form, _distance(ours, plain)))
            del net
            gc.collect()
        return {"tables": {"agreement": rows}}

    def gradients(
        self, net: PASNet, dtype: torch.dtype, *, autocast: bool = False, form: str = ""
    ) -> dict[str, Tensor]:
        """Of the cross-entropy of two clips of 4 frames, batch norm with its stored statistics; `form`: of the training
        form of that name. On a device without bf16 in hardware there is no `autocast`."""
        model = (self.training_form(net, form) if form else copy.deepcopy(net)).to(dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            logits = model(self.clips(2, 4, 64 if self.quick else 112))
        logits = logits if dtype == torch.float64 else logits.float()
        nn.functional.cross_entropy(logits, torch.arange(2, device=self.device)).backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    def training_form(self, net: PASNet, form: str) -> PASNet:
        """What `pasnet train` trains, with the same weights: the layout of `build`, for bf16 on a GPU another."""
        with self.device:
            model = build(net.config)
        model.load_state_dict(net.state_dict())
        if self.gpu and "bf16" in form:
            for_tensor_cores(model)
        return model.train(net.training)

    def forward(self) -> list[dict[str, Any]]:
        """Clips per second by network, K, form and batch."""
        rows: list[dict[str, Any]] = []
        sizes = (8, 16, 32) if not self.quick else (2,)
        cases: list[tuple[str, str, int, nn.Module | None]] = []
        cases += [("PAS-Net", STYLE, k, None) for k in sizes] + [("ECO-Lite", "A", k, None) for k in sizes]
        cases.append(("I3D", "", 64 if not self.quick else 16, self.i3d()))
        for network, style, k, given in cases:
            if network == "I3D" and given is None:
                rows.append({"network": "I3D", "not_run": self.not_run["I3D"]})
                continue
            net = given if given is not None else self.network(style)
            forms = self.forms(net)
            if k > sizes[0] and not self.gpu and network == "PAS-Net":
                del forms["reference"]  # its ratio is known from K = 8
            most = 8 if network == "I3D" else max(1, FRAMES // k)  # clips of a large batch on a GPU
            batches = (1, 4, most) if self.gpu else (1, 4) if k == sizes[0] and network != "I3D" else (1,)
            for batch in sorted(set(batches)):
                x = self.clips(batch, k)
                large = self.gpu and batch == most
                chosen = {form: fast for form, fast in forms.items()
                          if form == "bf16" or batch == 1 or (form == "fp32" and not large)}  # fmt: skip
                if large and k > 8 and not self.quick:  # each takes a minute or half of one to compile
                    chosen["bf16, compiled"] = self.compiled(net)
                work = {form: _inference(fast, x, 3 if "compiled" in form else 1) for form, fast in chosen.items()}
                rounds = (1 if k == 32 else 2) if k > sizes[0] and not self.gpu else None
                taken = self.alternate(work, rounds, f"{network}, K = {k}, batch {batch}, ")
                for form, seconds in taken.items():
                    row = self.row(network, style, k, form, batch, seconds, self.macs(net, style, k))
                    # a CUDA graph's memory is its own, and no longer counted once it is recorded
                    row["peak_mb"] = None if "compiled" in form else self.peak(work[form])
                    rows.append(row)
                    if network == "PAS-Net" and k == sizes[0] and batch == 1 and form != "reference":
                        self.ratios[form] = _ratio(taken["reference"], seconds)
                    print(f"  {network} K={k} batch {batch} {form}: {row['clips_per_second']}/s", file=sys.stderr)
                if "bf16, compiled" in taken and isinstance(net, PASNet):
                    with torch.inference_mode():
                        error = _off(chosen["bf16, compiled"](x), net(x))
                    case = {"network": style, "what": f"logits, K = {k}, batch {batch}"}
                    self.also.append(case | _agrees("bf16, compiled", error))
                del chosen, work
            del net, forms
            gc.collect()
        return rows

    def styles(self) -> list[dict[str, Any]]:
        """Every fusion style, K = 8, one clip at every width, or on a GPU four of width 1: how many times as fast as
        the reference."""
        rows = []
        for width in (0.125,) if self.quick else (1.0,) if self.gpu else (0.125, 0.25, 0.5, 1.0):
            for style in FUSION_TITLES:
                net = self.network(style, width)
                x = self.clips(4 if self.gpu else 1, 8 if not self.quick else 2)
                forms = self.forms(net)
                rounds = self.rounds if self.gpu or net.pose is None else {0.5: 2, 1.0: 1}.get(width, self.rounds)
                taken = self.alternate({form: _inference(fast, x) for form, fast in forms.items()}, rounds)
                for form, seconds in taken.items():
                    if form != "reference":
                        row = {"style": style, "width": width, "form": form, "num_segments": x.shape[1]}
                        row |= {"batch": len(x), "clips_per_second": round(len(x) / statistics.median(seconds), 4)}
                        rows.append(row | {"times_faster": _ratio(taken["reference"], seconds)})
                del net, forms
                gc.collect()
            print(f"  styles at width {width}", file=sys.stderr)
        return rows

    def training(self) -> list[dict[str, Any]]:
        """Forward and backward, clips per second: the reference against what `pasnet train` runs."""
        rows: list[dict[str, Any]] = []
        k, batches = (2 if self.quick else 16 if self.gpu else 8), ((4, 8) if self.gpu else (1,))
        for network, style in (("PAS-Net", STYLE), ("ECO-Lite", "A")):
            net = self.network(style).train()
            for batch in batches:
                x = self.clips(batch, k)
                work: dict[str, Step] = {}
                if batch == batches[0]:
                    work["reference"] = self.step(net, x, "")
                work["fp32"] = self.step(net, x, "fp32")
                if self.bf16:
                    work["bf16"] = self.step(net, x, "bf16")
                if network == "PAS-Net" and batch == batches[-1]:
                    form = "bf16" if self.gpu else "fp32"
                    for option in ("checkpoint_pose", "freeze_pose", *(("not turned",) if self.gpu else ())):
                        work[f"{form}, {option}"] = self.step(net, x, f"{form}, {option}")
                if self.gpu and batch == batches[-1]:
                    work["bf16, compiled"] = self.step(net, x, "bf16, compiled", times=4)
                for form, seconds in self.alternate(work, of=f"training of {network}, batch {batch}, ").items():
                    macs = 3 * self.macs(net, style, k)
                    if "freeze_pose" in form:  # it has no backward pass
                        config = ModelConfig(num_classes=101, width=self.width, fusion=FusionConfig(style="A"))
                        macs -= 2 * (macs / 3 - cost(config, k, self.size).gmacs)
                    row = self.row(network, style, k, form, batch, seconds, macs)
                    row["peak_mb"] = None if "compiled" in form else self.peak(work[form])
                    rows.append(row)
                    print(f"  training {network} batch {batch} {form}: {row['clips_per_second']}/s", file=sys.stderr)
                    if "compiled" in form:
                        row |= {"first_seconds": round(work[form].first_seconds, 1)}
                        row |= {"without_graphs": counters["inductor"]["cudagraph_skips"]}  # such parts of it
                        self.also += self.compared(work[form], {"network": style, "form": form}, k)
                del work
                torch.compiler.reset()  # else what was compiled, and its gradients, stay in the memory
                gc.collect()
            del net
        if (i3d := self.i3d()) is not None:
            frames, batch = (64 if not self.quick else 16), (8 if self.gpu else 1)
            x = self.clips(batch, frames)
            work = {"reference": self.step(i3d.train(), x, "")}
            if self.bf16:
                work["bf16"] = self.step(i3d, x, "bf16")
            for form, seconds in self.alternate(work, None if self.gpu else 1, "training of I3D, ").items():
                row = self.row("I3D", "", frames, form, batch, seconds, 3 * self.macs(i3d, "", frames))
                rows.append(row | {"peak_mb": self.peak(work[form])})
                print(f"  training I3D {form}: {row['clips_per_second']}/s", file=sys.stderr)
        return rows

    def compared(self, step: Step, case: dict[str, Any], k: int) -> list[dict[str, Any]]:
        """Lines of the agreement for a compiled training step."""
        of = f"K = {k}, batch {len(step.x)}"
        try:
            times, off = step.compare()
        except RuntimeError as error:
            self.not_run[f"{case['network']}, gradients of {case['form']}, {of}"] = str(error).splitlines()[0][:200]
            return []
        far = {"error": round(times, 3), "bound": TIMES_AS_FAR, "agrees": times <= TIMES_AS_FAR}
        return [
            case | {"what": f"compiled gradients: times as far from fp32 as eager ones, {of}"} | far,
            case | {"what": f"compiled gradients of two batches, added up, {of}"} | _agrees(case["form"], off),
        ]

    def memory(self) -> list[dict[str, Any]]:
        """What a clip leaves for the backward pass, counted: in full, with checkpoints, with a frozen pose network."""
        rows = []
        for k in (8, 16, 32):
            of = cost(ModelConfig(num_classes=101, fusion=FusionConfig(style=STYLE)), k)
            sizes = {"gb": of.activation_bytes, "gb_checkpoint": of.checkpointed_bytes, "gb_frozen": of.frozen_bytes}
            rows.append({"num_segments": k, **{name: round(size / 1e9, 3) for name, size in sizes.items()}})
        return rows

    # ---- details ----

    def step(self, net: nn.Module, x: Tensor, form: str, times: int = 1) -> Step:
        """A training step's passes, in a form of `net`; the first call makes `times` of them."""
        model = net
        if isinstance(net, PASNet) and form:
            model = self.training_form(net, form)
            assert isinstance(model, PASNet)
            if model.pose is not None:
                model.pose.checkpoint = "checkpoint_pose" in form
                model.pose.turned = model.pose.turned and "not turned" not in form
                if "freeze_pose" in form:
                    model.pose.requires_grad_(False)
        elif form and self.gpu:
            model = copy.deepcopy(net).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return Step(model, x, bf16="bf16" in form, compile="compiled" in form, times=times)

    def row(
        self, network: str, style: str, k: int, form: str, batch: int, seconds: list[float], gmacs: float
    ) -> dict[str, Any]:
        """One line of a table of speeds."""
        median = statistics.median(seconds)
        row: dict[str, Any] = {"network": network, "style": style, "num_segments": k, "width": self.width}
        row |= {"form": form, "batch": batch, "clips_per_second": round(batch / median, 4)}
        row |= {"gmac_per_second": round(batch * gmacs / median, 1), "seconds": [round(s, 5) for s in seconds]}
        return row

    def macs(self, net: nn.Module, style: str, k: int) -> float:
        """10^9 multiply-adds of a clip."""
        if isinstance(net, PASNet):
            return cost(net.config, k, self.size).gmacs
        shadow = copy.deepcopy(net).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shadow(torch.empty(1, k, 3, self.size, self.size, dtype=torch.uint8, device="meta"))
        return counter.get_total_flops() / 2e9

    def i3d(self) -> nn.Module | None:
        """The baseline with random weights, or None with a reason on record."""
        try:
            from pasnet.models.i3d import I3D
        except ImportError as error:
            self.not_run["I3D"] = str(error)
            return None
        torch.manual_seed(0)
        with self.device:
            return I3D(num_classes=400, **({"width": 0.125} if self.quick else {})).eval()


class Autocast(nn.Module):
    """A network under bf16 autocast."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.net, self.device = net, device

    def forward(self, x: Tensor) -> Tensor:
        """As the network's, in fp32 again."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.net(x).float()


class Smooth(TorchFunctionMode):
    """Within it, ReLU is x times the sigmoid of x / r (SiLU), r the channel's root mean square, a constant for
    gradients; and maximum pooling is average pooling.

    So a network keeps the size of its maps, but has no kinks, at which rounding decides between two gradients. It is
    another network, and better conditioned, the less sharp the more so: with the sigmoid of 2x / r, which was tried
    first, bf16's gradients were 0.018 to 0.022 from fp32's on an H200; with this one 0.006 to 0.007, the plain form's
    0.004; with ReLU itself 0.06 to 0.1, the plain form's as well as ours. So these rows are of how exact our arithmetic
    is, which a gross mistake in it would show, and not of how far bf16 is from fp32 in PAS-Net.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As `func`, but for those two."""
        kwargs = kwargs or {}
        if func in (nn.functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
            others = [axis for axis in range(x.dim()) if axis != 1]
            size = x.detach().square().mean(others, keepdim=True).sqrt().clamp_min(1e-12)
            return (x * torch.sigmoid(x / size)).to(args[0].dtype)
        if func in (nn.functional.max_pool2d, torch.max_pool2d):
            same = {name: value for name, value in kwargs.items() if name not in ("dilation", "return_indices")}
            return nn.functional.avg_pool2d(*args, **same)
        return func(*args, **kwargs)


class Step:
    """Forward and backward pass as in `pasnet train`, without its clipping, optimiser and loader."""

    def __init__(self, model: nn.Module, x: Tensor, *, bf16: bool, compile: bool, times: int) -> None:
        """`times`: passes of the first call, in which a form is compiled and its CUDA graphs are recorded."""
        self.model, self.x, self.bf16, self.compile = model, x, bf16, compile
        self.labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.forward: Callable[[Tensor], Tensor] = model
        if compile:
            if isinstance(model, PASNet):
                model.dropout.p = 0.0  # so that `compare` has the same network twice
            torch.compiler.reset()
            counters.clear()
            self.forward = compiled(model, len(x), graphs=x.is_cuda)
        self.first = iter([times])
        self.first_seconds = 0.0  # of the first pass, in which it is compiled

    def __call__(self) -> None:
        """One pass; its gradients are thrown away, or set to 0."""
        for _ in range(next(self.first, 1)):
            started = time.perf_counter()
            self.backward(self.forward, self.x)
            self.first_seconds = self.first_seconds or time.perf_counter() - started
            self.model.zero_grad(set_to_none=not self.compile)

    def backward(self, forward: Callable[[Tensor], Tensor], x: Tensor, bf16: bool = True) -> None:
        """One pass of a form of it, whose gradients add to those that are there."""
        torch.backends.cudnn.benchmark = self.bf16
        try:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16 and bf16):
                logits = forward(x)
            nn.functional.cross_entropy(logits.float(), self.labels).backward()
        finally:
            torch.backends.cudnn.benchmark = False

    def compare(self) -> tuple[float, float]:
        """Of what is compiled: times as far from the fp32 gradients as those of the same network, eager; and how far
        two batches' gradients, added up by it, are from the sum of its own of each."""

        def gradients(forward: Callable[[Tensor], Tensor], *clips: Tensor, bf16: bool = True) -> dict[str, Tensor]:
            for x in clips:
                self.backward(forward, x, bf16)
            found = {name: p.grad.double() for name, p in self.model.named_parameters() if p.grad is not None}
            self.model.zero_grad(set_to_none=not self.compile)
            return found

        other = self.x.flip(0, 1)
        exact = gradients(self.model, self.x, bf16=False)
        one, two, both = (gradients(self.forward, *clips) for clips in ((self.x,), (other,), (self.x, other)))
        off, own = _distance(one, exact), _distance(gradients(self.model, self.x), exact)
        return off / own, _distance(both, {name: one[name] + two[name] for name in one})


def _inference(net: nn.Module, x: Tensor, times: int = 1) -> Callable[[], object]:
    """`times`: how often the first call runs it; a CUDA graph is recorded in the second and third."""
    first = iter([times])

    def run() -> object:
        with torch.inference_mode():
            for _ in range(next(first, 1)):
                found = net(x)
            return found

    return run


def _ratio(slower: list[float], faster: list[float]) -> float:
    """Median over rounds of how many times as fast the second is."""
    return round(statistics.median(a / b for a, b in zip(slower, faster, strict=True)), 3)


def _agrees(form: str, error: float) -> dict[str, Any]:
    bound = BOUND_AGREEMENT["bf16" if "bf16" in form else "fp32"]
    return {"form": form, "error": float(f"{error:.2e}"), "bound": bound, "agrees": error <= bound}


def _off(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, over all tensors together."""
    off = torch.stack([(found[name] - tensor).norm() for name, tensor in expected.items()]).norm()
    return (off / torch.stack([tensor.norm() for tensor in expected.values()]).norm()).item()


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest `_distance` of a tensor of its own; NaN where one is."""
    return torch.tensor([_distance({name: found[name]}, {name: expected[name]}) for name in expected]).max().item()


def _bound(text: str, measured: float | None, least: float) -> dict[str, Any]:
    return {"bound": text, "measured": measured, "met": None if measured is None else measured >= least}


def _busy_seconds() -> float:
    """CPU seconds that the whole machine has spent on anything, or that its host took away; 0 where nothing tells."""
    try:
        ticks = list(map(int, Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()[1:9]))
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for the disk


def _status(name: str) -> int:
    """A size in kB from /proc/self/status."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def report(content: dict[str, Any]) -> None:
    """Prints the tables and the bounds."""
    for title, table in content["tables"].items():
        print(f"\n{title}")
        for row in table:
            print("  " + "  ".join(f"{k} {v}" for k, v in row.items() if not isinstance(v, list)))
    for line in content.get("bounds", []):
        verdict = {True: "met", False: "NOT met", None: "not measured"}[line["met"]]
        print(f"  {line['bound']:80} {line['measured']}  {verdict}")
    for name, reason in content.get("not_run", {}).items():
        print(f"  {name} not run: {reason}")


if __name__ == "__main__":
    main()
