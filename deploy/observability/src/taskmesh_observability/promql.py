"""PromQL held against the series there are: a name, a label or a join that cannot work is found without any data."""

from __future__ import annotations

from collections.abc import Mapping

import promql_parser as ast

Labels = frozenset[str]


class Unsound(Exception):
    """An expression that parses and names what is not there."""


def labels_of(expression: str, known: Mapping[str, Labels]) -> Labels | None:
    """The labels that the expression's result may have; None for a number.

    Args:
        known: Every series, with its labels.

    Raises:
        Unsound: It names a series or a label that does not exist, or joins what never matches.
    """
    try:
        return _Reader(known).read(ast.parse(expression))
    except ValueError as error:
        raise Unsound(f"{error}: {expression}") from error


class _Reader:
    def __init__(self, known: Mapping[str, Labels]) -> None:
        self._known = known

    def read(self, node: object) -> Labels | None:  # noqa: PLR0911 - one for each kind of node
        match node:
            case ast.VectorSelector():
                return self._selector(node)
            case ast.MatrixSelector():
                return self._selector(node.vector_selector)
            case ast.SubqueryExpr() | ast.ParenExpr() | ast.UnaryExpr():
                return self.read(node.expr)
            case ast.AggregateExpr():
                return self._aggregate(node)
            case ast.Call():
                return self._call(node)
            case ast.BinaryExpr():
                return self._binary(node)
            case ast.NumberLiteral():
                return None
            case _:
                raise Unsound(f"{type(node).__name__} is not understood")

    def _selector(self, node: ast.VectorSelector) -> Labels:
        if node.name is None or node.name not in self._known:
            raise Unsound(f"no metric is called {node.name}")
        labels = self._known[node.name]
        for matcher in node.matchers.matchers:
            self._need(labels, {matcher.name}, str(node.name))
        return labels

    def _aggregate(self, node: ast.AggregateExpr) -> Labels:
        inner = self.read(node.expr) or frozenset()
        if str(node.op) in {"topk", "bottomk"}:
            return inner
        added = {node.param.val} if str(node.op) == "count_values" and node.param is not None else set()
        if node.modifier is None:
            return frozenset(added)
        named = frozenset(node.modifier.labels)
        self._need(inner, named, str(node.op))
        return (named if node.modifier.type == ast.AggModifierType.By else inner - named) | added

    def _call(self, node: ast.Call) -> Labels | None:
        arguments = list(node.args)
        match node.func.name:
            case "label_replace":
                vector, target, _, source, _ = arguments
                inner = self.read(vector) or frozenset()
                if source.val:
                    self._need(inner, {source.val}, "label_replace")
                return inner | {target.val}
            case "histogram_quantile":
                inner = self.read(arguments[1]) or frozenset()
                self._need(inner, {"le"}, "histogram_quantile")
                return inner - {"le"}
            case "absent" if isinstance(arguments[0], ast.VectorSelector):
                self.read(arguments[0])
                equal = [each.name for each in arguments[0].matchers.matchers if each.op == ast.MatchOp.Equal]
                return frozenset(equal)
            case "vector":
                return frozenset()
            case "time":
                return None
            case _:
                return self.read(next(each for each in arguments if not _is_literal(each)))

    def _binary(self, node: ast.BinaryExpr) -> Labels | None:
        left, right = self.read(node.lhs), self.read(node.rhs)
        if left is None or right is None:
            return right if left is None else left
        if str(node.op) == "or":
            return left | right
        if node.modifier is None or node.modifier.matching is None:
            if left != right:
                raise Unsound(f"{sorted(left)} {node.op} {sorted(right)} never match; say on (...)")
            return left
        on = self._joined(node.modifier.matching, left, right)
        if str(node.op) in {"and", "unless"}:
            return left
        if node.modifier.card != ast.VectorMatchCardinality.ManyToOne:
            return on
        extra = frozenset(node.modifier.group_labels or ())
        self._need(right, extra, "group_left")
        return left | extra

    def _joined(self, matching: ast.LabelModifier, left: Labels, right: Labels) -> Labels:
        if matching.type == ast.LabelModifierType.Exclude:
            raise Unsound("say on (...), not ignoring (...): what is ignored changes with each new label")
        on = frozenset(matching.labels)
        self._need(left, on, "on")
        self._need(right, on, "on")
        return on

    @staticmethod
    def _need(there: Labels, named: set[str] | Labels, by: str) -> None:
        if missing := set(named) - there:
            raise Unsound(f"{by} has no label {', '.join(sorted(missing))}; it has {', '.join(sorted(there))}")


def _is_literal(node: ast.Expr) -> bool:
    return isinstance(node, ast.NumberLiteral | ast.StringLiteral)
