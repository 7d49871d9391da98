"""Write graphs in ComfyUI's interface format, checked against the schemas of a running server.

    graph = Graph(server.object_info())
    demo = graph.node("ErasureLoadDemo")
    text = graph.node("CLIPTextEncode", clip=demo["CLIP"], text="a cat")
    graph.place(0, 0, demo, text)
    graph.data()

Inputs are given by name: an output of another node makes a link, anything else is a widget's value. A name that the
schema does not have, a wrong type and a missing input raise, so that a graph that was written can be opened and run.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
BYPASS = 4
TITLE = 30
"""Height of a node's title bar, which lies above its position."""
SCREEN, VISIBLE, READABLE = (1440, 900), (70, 100, 1350, 780), 0.65
"""Pixels of a small screen; its part that no bar of the page covers (left, top, width, height); a scale at which nodes can be
read. The page writes no text below 0.57, and fits a graph it opens into three quarters of its window."""
PACK_ID = "concept-erasure"
"""Our name in the registry; Manager finds the pack of a missing node by it."""
OURS = {"color": "#232", "bgcolor": "#353"}
NOTE = {"color": "#432", "bgcolor": "#653"}
SUBGRAPH_IN, SUBGRAPH_OUT = -10, -20
_NAMESPACE = uuid.UUID("5d3cf2a6-7a55-4a0e-9d5c-5e2f1d0a6b11")


@dataclass(frozen=True)
class Output:
    """One output socket: what an input is linked to."""

    node: int
    slot: int
    type: str


@dataclass
class Node:
    id: int
    type: str
    size: tuple[int, int]
    title: str = ""
    mode: int = 0
    collapsed: bool = False
    look: Json = field(default_factory=dict)
    properties: Json = field(default_factory=dict)
    inputs: list[Json] = field(default_factory=list)
    outputs: list[Json] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    pos: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Output:
        """The output of this name or type."""
        for slot, output in enumerate(self.outputs):
            if name in (output["name"], output["type"]):
                return Output(self.id, slot, output["type"])
        raise KeyError(f"{self.type} has no output {name!r}, only {[o['name'] for o in self.outputs]}")

    @property
    def height(self) -> int:
        """Below the title bar; nothing where only that is shown."""
        return 0 if self.collapsed else self.size[1]

    def data(self, order: int) -> Json:
        flags = {"collapsed": True} if self.collapsed else {}
        out = {"id": self.id, "type": self.type, "pos": list(self.pos), "size": list(self.size), "flags": flags}
        out |= {"order": order, "mode": self.mode, "inputs": self.inputs, "outputs": self.outputs}
        out |= {"title": self.title} if self.title else {}
        return out | {"properties": self.properties, "widgets_values": self.values} | self.look


def input_specs(schema: Json) -> list[tuple[str, str, Json, bool]]:
    """(name, type, options, is it a widget) of every input, in the order in which the page keeps widget values."""
    out = []
    for part in ("required", "optional"):
        for name, spec in schema["input"].get(part, {}).items():
            kind = "COMBO" if isinstance(spec[0], list) else str(spec[0])
            options = spec[1] if len(spec) > 1 else {}
            out.append((name, kind, options, kind in WIDGETS and not options.get("forceInput")))
    return out


def has_control(name: str, kind: str, options: Json) -> bool:
    """Does the page put a "control after generate" choice behind this widget?"""
    asked = options.get("control_after_generate")
    return kind == "INT" and name in ("seed", "noise_seed") if asked is None else bool(asked)


def fits(output: str, wanted: str) -> bool:
    return "*" in (output, wanted) or not set(output.split(",")).isdisjoint(wanted.split(","))


class Graph:
    """A graph in the making."""

    def __init__(self, info: Json, name: str = "") -> None:
        self.info, self.name = info, name
        self.nodes: list[Node] = []
        self.groups: list[Json] = []
        self.links: list[tuple[int, Output, int, int]] = []
        """(link, from, to node, to slot)"""
        self.subgraphs: dict[str, Subgraph] = {}

    def node(
        self,
        type: str,
        size: tuple[int, int] = (0, 0),
        title: str = "",
        bypass: bool = False,
        collapsed: bool = False,
        properties: Json | None = None,
        **inputs: Any,
    ) -> Node:
        """Add a node; `size` is enlarged to what its sockets and widgets need."""
        schema = self.info[type]
        specs = input_specs(schema)
        if unknown := set(inputs) - {name for name, *_ in specs}:
            raise KeyError(f"{type} has no input {', '.join(sorted(unknown))}")
        look = OURS if type.startswith("Erasure") else {}
        node = Node(len(self.nodes) + 1, type, size, title, BYPASS if bypass else 0, collapsed, look)
        node.properties = {"Node name for S&R": type, "cnr_id": PACK_ID if look else "comfy-core"} | (properties or {})
        rows = tall = 0
        # The page lists sockets first, then the sockets of widgets.
        for name, kind, options, widget in sorted(specs, key=lambda spec: spec[3]):
            given = inputs.get(name)
            socket: Json = {"name": name, "type": kind, "link": None}
            if widget:
                socket["widget"] = {"name": name}
                if not isinstance(given, Output):
                    node.values.append(self._value(type, name, kind, options, given))
                else:
                    node.values.append(options.get("default", 0))
                control = has_control(name, kind, options)
                node.values += ["fixed"] if control else []
                tall += bool(options.get("multiline"))
                rows += 1 + control - bool(options.get("multiline"))
            elif given is None and name in schema["input"].get("required", {}):
                raise ValueError(f"{type}: input {name} is not connected")
            node.inputs.append(socket)
            if isinstance(given, Output):
                self._link(given, node, len(node.inputs) - 1, kind)
        names = schema.get("output_name") or schema["output"]
        node.outputs = [{"name": n, "type": t, "links": []} for n, t in zip(names, schema["output"], strict=True)]
        sockets = sum("widget" not in i for i in node.inputs)
        needed = 20 * max(sockets, len(node.outputs)) + 6 + (8 if rows or tall else 0) + 24 * rows + 54 * tall
        node.size = (size[0] or 210, max(size[1], needed))
        self.nodes.append(node)
        return node

    def _value(self, type: str, name: str, kind: str, options: Json, given: Any) -> Any:
        if given is not None:
            return given
        if "default" in options:
            return options["default"]
        if kind == "COMBO":
            raise ValueError(f"{type}: choose a value for {name}")
        return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")

    def _link(self, source: Output, node: Node, slot: int, wanted: str) -> None:
        if not fits(source.type, wanted):
            raise TypeError(f"{node.type}.{node.inputs[slot]['name']} takes {wanted}, not {source.type}")
        number = len(self.links) + 1
        node.inputs[slot]["link"] = number
        self.links.append((number, source, node.id, slot))

    def note(self, text: str, size: tuple[int, int]) -> Node:
        node = Node(len(self.nodes) + 1, "MarkdownNote", size, "Read me", look=NOTE, values=[text.strip()])
        self.nodes.append(node)
        return node

    def instance(self, subgraph: Subgraph, title: str = "", width: int = 210, **inputs: Output) -> Node:
        """Add a node that stands for a subgraph."""
        self.subgraphs[subgraph.id] = subgraph
        height = 20 * max(len(subgraph.inputs), len(subgraph.outputs)) + 6
        node = Node(len(self.nodes) + 1, subgraph.id, (width, height), title or subgraph.name)
        for slot, (name, kind) in enumerate(subgraph.inputs.items()):
            node.inputs.append({"name": name, "type": kind, "link": None})
            self._link(inputs.pop(name), node, slot, kind)
        if inputs:
            raise KeyError(f"{subgraph.name} has no input {', '.join(inputs)}")
        node.outputs = [{"name": name, "type": out.type, "links": []} for name, out in subgraph.outputs.items()]
        self.nodes.append(node)
        return node

    @staticmethod
    def place(x: int, y: int, *nodes: Node, gap: int = 24) -> int:
        """Stack nodes downwards from there; returns the y below them."""
        for node in nodes:
            node.pos = (x, y)
            y += node.height + TITLE + gap
        return y

    def group(self, title: str, nodes: Iterable[Node], color: str = "#3f789e") -> None:
        """A frame with a title around nodes that are in their places."""
        nodes = list(nodes)
        left, top = min(n.pos[0] for n in nodes), min(n.pos[1] for n in nodes)
        right, bottom = max(n.pos[0] + n.size[0] for n in nodes), max(n.pos[1] + n.height for n in nodes)
        pad, head = 16, TITLE + 50
        bounding = [left - pad, top - head, right - left + 2 * pad, bottom - top + head + pad]
        entry = {"id": len(self.groups) + 1, "title": title, "bounding": bounding, "color": color, "font_size": 24}
        self.groups.append(entry | {"flags": {}})

    def bounds(self, groups: bool = True) -> tuple[int, int, int, int]:
        """(left, top, width, height) of all nodes, and of the frames around them."""
        boxes = [(n.pos[0], n.pos[1] - TITLE, n.size[0], n.height + TITLE) for n in self.nodes]
        boxes += [tuple(group["bounding"]) for group in self.groups] if groups else []
        left, top = (min(box[i] for box in boxes) for i in (0, 1))
        return left, top, *(max(box[i] + box[i + 2] for box in boxes) - start for i, start in enumerate((left, top)))

    def view(self) -> Json:
        """How the page is to open it: nothing where it fits it readably itself, else from the note at the top left on."""
        own = 0.75 * min(side / (size + 20) for side, size in zip(SCREEN, self.bounds(groups=False)[2:], strict=True))
        if own >= READABLE:
            return {}
        left, top, *sizes = self.bounds()
        whole = min(side / size for side, size in zip(VISIBLE[2:], sizes, strict=True))
        scale = max(READABLE, round(whole, 2))
        return {"ds": {"scale": scale, "offset": [round(VISIBLE[0] / scale) - left, round(VISIBLE[1] / scale) - top]}}

    def _nodes(self) -> list[Json]:
        for number, source, *_ in self.links:
            if source.node > 0:
                links: list[int] = self.nodes[source.node - 1].outputs[source.slot]["links"]
                if number not in links:
                    links.append(number)
        return [node.data(order) for order, node in enumerate(self.nodes)]

    def data(self) -> Json:
        """The file's contents."""
        links = [[number, s.node, s.slot, to, slot, s.type] for number, s, to, slot in self.links]
        out = {"id": str(uuid.uuid5(_NAMESPACE, self.name)), "revision": 0, "last_node_id": len(self.nodes)}
        out |= {"last_link_id": len(self.links), "nodes": self._nodes(), "links": links, "groups": self.groups}
        if self.subgraphs:
            out["definitions"] = {"subgraphs": [s.definition() for s in self.subgraphs.values()]}
        return out | {"config": {}, "extra": self.view(), "version": 0.4}


class Subgraph(Graph):
    """A graph that is used as one node. Link its nodes to `input(name)`, and name what it gives with `output`."""

    def __init__(self, info: Json, name: str, inputs: dict[str, str]) -> None:
        super().__init__(info, name)
        self.id = str(uuid.uuid5(_NAMESPACE, f"subgraph {name}"))
        self.inputs = inputs
        self.outputs: dict[str, Output] = {}

    def input(self, name: str) -> Output:
        return Output(SUBGRAPH_IN, list(self.inputs).index(name), self.inputs[name])

    def output(self, name: str, source: Output) -> None:
        self.outputs[name] = source

    def definition(self) -> Json:
        links = [
            {"id": n, "origin_id": s.node, "origin_slot": s.slot, "target_id": to, "target_slot": slot, "type": s.type}
            for n, s, to, slot in self.links
        ]
        nodes = self._nodes()
        for slot, source in enumerate(self.outputs.values()):
            number = len(links) + 1
            nodes[source.node - 1]["outputs"][source.slot]["links"].append(number)
            link = {"id": number, "origin_id": source.node, "origin_slot": source.slot, "type": source.type}
            links.append(link | {"target_id": SUBGRAPH_OUT, "target_slot": slot})
        left = min(n.pos[0] for n in self.nodes)
        right = max(n.pos[0] + n.size[0] for n in self.nodes)
        ends = [
            (SUBGRAPH_IN, "origin", self.inputs),
            (SUBGRAPH_OUT, "target", {n: o.type for n, o in self.outputs.items()}),
        ]
        sockets = [
            [
                {
                    "id": str(uuid.uuid5(_NAMESPACE, f"{self.name} {end} {name}")),
                    "name": name,
                    "type": kind,
                    "linkIds": [k["id"] for k in links if (k[f"{side}_id"], k[f"{side}_slot"]) == (end, slot)],
                }
                for slot, (name, kind) in enumerate(names.items())
            ]
            for end, side, names in ends
        ]
        state = {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0}
        box = {"id": self.id, "version": 1, "state": state, "revision": 0, "config": {}, "name": self.name}
        for key, x, end, names in (
            ("inputNode", left - 220, SUBGRAPH_IN, self.inputs),
            ("outputNode", right + 80, SUBGRAPH_OUT, self.outputs),
        ):
            box[key] = {"id": end, "bounding": [x, 0, 120, 40 + 20 * len(names)]}
        box |= {"inputs": sockets[0], "outputs": sockets[1], "widgets": [], "nodes": nodes, "groups": []}
        return box | {"links": links, "extra": {}}
