"""The sections of docs/benchmarks.md: one function for each kind of result, from its JSON to Markdown."""

import statistics
from collections.abc import Callable

from tables import ROOT, Result, computes_bfloat16, figure, kind_of_cpu, origin, table

_CLS_COLUMNS = (("cls_ms", 0), ("cls_ratio", 2))
_FACTS = ("recall_at_10", "ms_a_query", "accuracy")


def ceilings(name: str, found: Result) -> str:
    models = ", ".join(dict.fromkeys(f"{row['model']} in {row['dtype']}" for row in found.get("forward", [])))
    parts = [f"## Ceilings: {models or 'no model'}, {kind_of_cpu(found)}\n\n{origin(name, found)}"]
    if "product_gflop_per_s" in found:
        products = ", ".join(f"{dtype} {value:,.0f}" for dtype, value in found["product_gflop_per_s"].items())
        laid_out = " with the weight laid out once, as the model's are" if found.get("product_packed") else ""
        parts.append(f"A product of two 2,048 × 2,048 matrices on one thread{laid_out}, GFLOP/s: {products}.")
    if "copy_gb_per_s" in found:
        parts[-1] += f" Copying memory: {found['copy_gb_per_s']:.1f} GB/s."
    if "write" in found:
        parts[-1] += f" Encoding and storing a part: {found['write']['mb_per_s']:,.0f} MB/s."
    if "forward" in found:
        rows = [
            (
                row["model"], row["dtype"], str(row["batch"]), str(row["threads"]), f"{row['ours_ms']:,.0f}",
                f"{row['transformers_ms']:,.0f}"
                + ("" if row["transformers_dtype"] == row["dtype"] else f" ({row['transformers_dtype']})"),
                f"{row['ratio']:.2f}",
                *(f"{row[key]:,.{digits}f}" if key in row else "-" for key, digits in _CLS_COLUMNS),
                f"{row['ours_gflop_per_s'] / found['product_gflop_per_s'][row['dtype']]:.0%}"
                if found.get("product_packed") and row["dtype"] in found["product_gflop_per_s"] and row["threads"] == 1
                else "-",
            )
            for row in found["forward"]
        ]  # fmt: skip
        head = (
            "model", "precision", "batch", "threads", "ours, ms an image", "transformers, ms", "ratio",
            "ours, CLS alone, ms", "ratio", "ours, share of the product",
        )  # fmt: skip
        parts.append(
            "The bare forward pass, in turn with transformers on the same weights; all outputs, and the CLS features "
            "alone, for which our last block computes nothing for the patches:\n\n" + table(head, rows)
        )
    if "compiled" in found:
        row = found["compiled"]
        parts.append(
            f"torch.compile with frozen weights, {row['model']}, float32, one thread: {row['compile_s']:.0f} s to "
            f"compile, then {row['compiled_ms']:.0f} ms an image, ours {row['ours_ms']:.0f}.\n"
        )
    if "decode" in found:
        rows = [
            (f"{row['width']} × {row['height']}", *(f"{row['ms'][key]:.1f}" for key in ("pillow", "exact", "fast")))
            for row in found["decode"]
        ]
        parts.append("Decoding one JPEG to 224 × 224, ms:\n\n" + table(("size", "Pillow", "exact", "fast"), rows))
    return "\n".join(parts)


# What the name of a peer's row does not say.
_PEERS = {"ray data, documented way": "ray data, documented way (one actor of one thread)"}


def peers(name: str, found: Result) -> str:
    rows = [
        (
            _PEERS.get(peer, peer), row["dtype"], f"{row['images_per_s']:.2f}",
            figure(row["patchstream_over_it"], 2), figure(row["least_cosine_to_patchstream"], 5),
        )
        for peer, row in found["results"].items()
    ]  # fmt: skip
    head = ("who", "precision", "images/s", "patchstream over it", "least cosine to patchstream")
    slow = (
        "The last column holds two precisions against each other where they differ. "
        if computes_bfloat16(found)
        else "This CPU does not compute in bfloat16, which is where `auto` gains most: it is emulated. "
    )
    return (
        f"## Peers: patchstream in {found['dtype']}, {kind_of_cpu(found)}\n\n{origin(name, found)}\n"
        f"{found['images']} photos, ViT-B/16, the same weights, each a process of "
        f"its own from start to end, in turn, {found['rounds']} round(s); ours with `--dtype {found['dtype']}`. {slow}"
        "Start-up is in the figures: Ray's processes make ours the longest, and weigh less in a longer job.\n\n"
        + table(head, rows)
    )


def preflight(name: str, found: Result) -> str:
    rows = [
        (
            source, f"{row['predicted_images_per_s']:.1f}", f"{row['real_images_per_s']:.1f}",
            f"{row['predicted_over_real']:.2f} ({', '.join(f'{ratio:.2f}' for ratio in sorted(row['ratios']))})",
            row["bottleneck"],
        )
        for source, row in found["results"].items()
    ]  # fmt: skip
    ratio = "predicted / real: median of the rounds (each)"
    head = ("input", "predicted images/s", "real images/s", ratio, "bottleneck")
    return f"## Preflight\n\n{origin(name, found)}\nModel: {found['model']}.\n\n" + table(head, rows)


def end_to_end(name: str, found: Result) -> str:
    decode_share = found["decode_core_s"] / (found["decode_core_s"] + found["forward_core_s"])
    shares = ", ".join(f"{item['share']:.0%}" for item in found["rounds"] if "share" in item)
    measured = (
        f"each round was held against forward passes before and after it ({shares})"
        if shares
        else "parts and job were measured in other minutes of a shared machine"
    )
    above = (
        ". Images that were decoded while the models loaded are not paid for in it, which is worth up to "
        f"{decode_share:.1%}; {measured}"
    )
    rounds = [item["job"]["stage_seconds"] for item in found["rounds"]]
    stages = {name: statistics.median(item[name] for item in rounds) for name in rounds[0]}
    each = ", ".join(f"{name} {seconds / found['images'] * 1e3:.1f}" for name, seconds in stages.items())
    started = (
        f" From the command to the first batch, Ray included, it took {found['command_to_first_batch_s']:.1f} s."
        if "command_to_first_batch_s" in found
        else ""
    )
    emulated = (
        "This CPU does not compute in bfloat16 but emulates it, which makes the forward pass, and its share, larger. "
        if found["dtype"] == "bfloat16" and not computes_bfloat16(found)
        else ""
    )
    return (
        f"## End to end, {found['model'].removeprefix('patchstream-')}, {found['dtype']}\n\n{origin(name, found)}\n"
        f"{emulated}{len(found['rounds'])} round(s) of {found['images']} photos. Decoding takes "
        f"{found['decode_core_s'] * 1e3:.1f} ms and the bare forward pass {found['forward_core_s'] * 1e3:.1f} ms of a "
        f"core for each image, which makes an ideal of {found['ideal_images_per_s']:.1f} images/s; the "
        f"job ran at {found['steady_images_per_s']:.1f} in its steady "
        "state (medians); of the ideal of its own round it reached "
        f"{found['share_of_ideal']:.0%} in the median{above}.{started} Within the job, "
        f"milliseconds of a worker for each image, medians as well: {each}.\n"
    )


def scale(name: str, found: Result) -> str:
    rows = [
        (
            f"{row['rows']:,}", f"{row['seconds']:,.1f}", f"{row['rows_per_s'] or 0:,.0f}",
            f"{row['resume_planning_s']:.3f}", f"{row['holes']['resume_planning_s']:.3f}" if row.get('holes') else "-",
            *(f"{row[key]:,.0f}" if row.get(key) else "-" for key in ("driver_first_mib", "driver_last_mib",
                                                                      "driver_peak_mib")),
        )
        for row in found["results"]
    ]  # fmt: skip
    head = (
        "rows", "seconds in all", "rows/s of the stream, once all ran", "resume planning, s", "with gaps, s",
        "driver first, MiB", "last", "peak",
    )  # fmt: skip
    picture = next((path.name for path in sorted((ROOT / "docs" / "pictures").glob("*scale*"))), None)
    shown = f"\n![time and memory by rows](pictures/{picture})\n" if picture else ""
    if "planning" in found:
        plan = found["planning"]
        shown += (
            f"\nPlanning a resume of {plan['rows']:,} rows in {plan['parts']:,} parts, all with gaps: "
            f"{plan['resume_planning_s']:.1f} s.\n"
        )
    left_out = "\nMemory is the driver's until the last row is committed; compaction behind it holds one part more.\n"
    return f"## Scale, null predictor\n\n{origin(name, found)}\n{table(head, rows)}{left_out}{shown}"


def endurance(name: str, found: Result) -> str:
    rows = [
        (process, *(f"{memory[key]:,.0f}" for key in ("early_mib", "late_mib", "peak_mib")))
        for process, memory in found["memory"].items()
    ]
    return (
        f"## Memory over time, {found['model']}\n\n{origin(name, found)}\n"
        f"One job for {found['minutes']:g} minutes: {found['images']:,} images, {found['failures']:,} failures. Bytes "
        f"that the object store moved to disk: {found['spilled_bytes']:,}. Memory of the largest process in each "
        "role, as far as it is its own, MiB; early is the second tenth of the time, late the last one:\n\n"
        + table(("process", "early", "late", "peak"), rows)
    )


def triton(name: str, found: Result) -> str:
    ways = ("triton_shared_memory", "triton_wire")
    rows = [
        (
            size["size"], f"{size['wall_ms_an_image']['torch']:.1f}",
            *(f"{size['wall_ratio'][way]:.2f}" for way in ways),
            f"{size['core_ms_an_image']['torch']:.1f}",
            *(f"{size['core_ms_added_to_an_image'][way]:+.2f}" for way in ways),
            f"{size['largest_difference']:.1e}",
        )
        for size in found["sizes"]
    ]  # fmt: skip
    head = (
        "model", "torch in the actor, ms an image", "throughput, shared memory ÷ torch", "over the wire ÷ torch",
        "torch, core-ms an image", "added, shared memory", "added, over the wire", "largest difference of CLS",
    )  # fmt: skip
    return (
        f"## Through a Triton server\n\n{origin(name, found)}\n"
        "Float32, one thread on either side, "
        f"{len(found['sizes'][0]['rounds'])} rounds in turn of {found['images']} pictures; medians, ratios within a "
        f"round. The load of the machine was {found['environment']['load_before']:.1f} beforehand: where that is above "
        "its cores, the clock's columns are noise and the cores' count.\n\n"
        f"{table(head, rows)}\n"
        "What costs: the pixels of a picture of 224 × 224 (147 KiB) are copied into shared memory, or packed into a "
        "message, sent and unpacked; the server hands them to the process of its Python back end; the outputs go the "
        "same way back; threads on both sides wait for each other. Where less was added to the larger model, or less "
        "than nothing, the scatter of the rounds is larger than what was added. It pays off where a server has the "
        "accelerator already, or serves others at the same time; where the machine is the job's alone, the actor is "
        "the shorter way.\n"
    )


def retrieval(name: str, found: Result) -> str:
    notes = {
        key: ", ".join(
            f"{fact.replace('_', ' ')} {row[fact]:.4g}" for fact in _FACTS if isinstance(row.get(fact), float)
        )
        for key, row in found["commands"].items()
    }
    rows = [
        (key.replace("_", " "), f"{row['wall_s']:,.1f}", f"{row['peak_mib']:,}", notes[key] or "-")
        for key, row in found["commands"].items()
    ]
    exact = "\n".join(
        f"- {key.split('_')[1]} at once: {row['search'] * 1e3:.0f} ms, {row['ratio']:.2f} times the fastest bare "
        f"product (torch {row['torch'] * 1e3:.0f} ms, NumPy {row['numpy'] * 1e3:.0f} ms)"
        for key, row in found.get("exact_search_s", {}).items()
    )
    return (
        f"## Retrieval, {found['rows']:,} × {found['dim']} float32\n\n{origin(name, found)}\n"
        + table(("command", "seconds", "peak memory, MiB", "result"), rows)
        + f"\nExact search by vectors, against a bare product with the same matrix:\n\n{exact}\n"
    )


def gpu(name: str, found: Result) -> str:
    ceiling = ", ".join(f"{key.replace('_', ' ')} {figure(value)}" for key, value in found["ceilings"].items())
    again = ", ".join(figure(value) for value in found["ceiling_at_the_end"].values()) or "-"
    kinds = list(dict.fromkeys(kind for row in found["products"].values() for kind in row))
    products = [(name, *(figure(row.get(kind, "")) for kind in kinds)) for name, row in found["products"].items()]
    attention = ", ".join(
        f"{key.lower().replace('_attention', '').replace('_', ' with ')} {figure(value)}"
        for key, value in found["attention"].items()
    )
    rows = [
        (
            row["model"], row["kind"], str(row["batch"]), f"{row['model_only']:,.0f}",
            f"{row['ceiling_share']:.0%}" if row["ceiling_share"] else "-",
            f"{row['end_to_end']:,.0f}", f"{row['end_to_end_share']:.0%}",
            f"{row['one_call_share']:.0%} of {row['call_batches']:g}", figure(row["copy_over_compute"], 2),
            f"{row['least_cosine']:.5f}",
            row["attention"].removesuffix("_ATTENTION").lower(),
        )
        for row in found["rates"]
    ]  # fmt: skip
    likeness = [(r["model"], r["dtype"], f"{r['cls']:.5f}", f"{r['pooled']:.5f}") for r in found["correctness"]]
    head = (
        "model", "precision", "batch", "model only, images/s", "share of the product ceiling", "end to end, images/s",
        "of model only", "one call alone, batches", "copying the pixels ÷ computing", "least cosine to a direct call",
        "attention",
    )  # fmt: skip
    missing = "".join(
        f"\n{title}:\n\n" + "\n".join(f"- {text}" for text in found[kind]) + "\n"
        for kind, title in (("wrong", "**Wrong results**"), ("left_out", "Left out"))
        if found[kind]
    )
    return (
        f"## GPUs\n\n{origin(name, found)}\nCeilings: {ceiling}; the product in bfloat16 again "
        f"at the end: {again}. Attention of a ViT-L/16 block, TFLOP/s by kernel: "
        f"{attention}. Its products at batch 256, TFLOP/s:\n\n{table(('product', *kinds), products)}\n"
        f"{table(head, rows)}\nLeast cosine to float32:\n\n"
        + table(("model", "precision", "cls", "pooled"), likeness)
        + missing
    )


SECTIONS: dict[str, Callable[[str, Result], str]] = {
    "preflight": preflight,
    "ceilings": ceilings,
    "peers": peers,
    "end_to_end": end_to_end,
    "scale": scale,
    "endurance": endurance,
    "triton": triton,
    "retrieval": retrieval,
    "gpu": gpu,
}
