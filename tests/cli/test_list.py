"""The verb `vitlib list`."""

from __future__ import annotations

import json

from fixtures.command_line import Run


def test_list_prints_a_table(run_cli: Run) -> None:
    status, out, err = run_cli("list", "vit_base_patch1?_siglip_2*")
    head, *rows = out.splitlines()
    assert (status, head.split()) == (0, ["name", "library", "family", "size", "status"])
    assert [row.split()[0] for row in rows] == [
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_siglip_256",
    ]
    assert rows[1].split("  ")[-1] == "loads"
    assert "768 wide, 12 blocks, 12 heads, patch 16, 256 pixels" in rows[1]
    assert err == "2 architectures, of which 2 load\n"
    assert run_cli("list", "-q", "vit_base_patch1?_siglip_2*") == (0, out, "")


def test_list_prints_the_reason_of_a_refusal(run_cli: Run) -> None:
    row = run_cli("list", "samvit_huge_patch16")[1].splitlines()[1]
    assert row.split(maxsplit=4)[2:4] == ["-", "-"]
    assert row.endswith("refused: windowed attention and a neck of convolutions")


def test_list_prints_every_architecture_as_json(run_cli: Run) -> None:
    status, out, err = run_cli("list", "--json")
    entries = {(entry["library"], entry["name"]): entry for entry in json.loads(out)}
    assert (status, err) == (0, "")
    assert {library for library, _ in entries} == {"timm", "transformers", "open_clip"}
    assert entries["open_clip", "ViT-B-32"] == {
        "name": "ViT-B-32",
        "library": "open_clip",
        "family": "clip",
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_dim": 3072,
        "image_size": 224,
        "patch_sizes": [32],
        "model_type": "",
        "hub_id": "",
        "new_name": "",
        "reason": "",
        "loads": True,
    }
    assert not entries["transformers", "swin"]["loads"]


def test_list_names_the_nearest_of_an_unknown_name(run_cli: Run) -> None:
    status, out, err = run_cli("list", "vit_base_patch16_225")
    assert (status, out) == (1, "")
    assert err.startswith("vitlib: error: no architecture is called 'vit_base_patch16_225': ")
    assert err.count("\n") == 1
    assert "the nearest are vit_base_patch16_224, " in err
