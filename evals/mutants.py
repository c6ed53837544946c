"""Small changes to a program, most of which break it: incorrect solutions where no code model is at hand."""
import ast

from evals.code import is_text, parse

OPPOSITE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And}


def mutate(source, rng):
    """Yield programs that differ from `source` in one place of a function's body, in random order.

    Each comes once and formatted by ast.unparse; none equals the source when that is formatted so. rng: a
    random.Random.
    """
    tree = parse(source)
    seen = {ast.unparse(tree)}
    changes = [(number, change) for number, (node, variables) in enumerate(_places(tree))
               for change in _changes(node, variables)]
    rng.shuffle(changes)
    for number, change in changes:
        changed = parse(source)
        change(_places(changed)[number][0])
        text = ast.unparse(ast.fix_missing_locations(changed))
        if text not in seen:
            seen.add(text)
            yield text


def _places(tree):
    """(node, names of the function's variables) for every function and every node of its body."""
    places = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        nodes = list(ast.walk(function))
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        variables = sorted(stored | {node.arg for node in nodes if isinstance(node, ast.arg)})
        places.append((function, variables))
        for statement in function.body:
            if not is_text(statement):
                places += [(node, variables) for node in ast.walk(statement)]
    return places


def _changes(node, variables):
    """Yield functions that change a node of this kind, each in one way."""
    match node:
        case ast.Compare():
            for at, operator in enumerate(node.ops):
                yield _replace("ops", OPPOSITE[type(operator)](), at)
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp():
            if type(node.op) in OPPOSITE:
                yield _replace("op", OPPOSITE[type(node.op)]())
        case ast.Constant(value=bool()):
            yield _replace("value", not node.value)
        case ast.Constant(value=int()):
            yield _replace("value", node.value + 1)
            yield _replace("value", node.value - 1)
        case ast.Name(ctx=ast.Load()) if node.id in variables:
            for name in variables:
                yield _replace("id", name)
        case ast.UnaryOp(op=ast.USub()):
            yield _replace("op", ast.UAdd())
        case ast.If() | ast.While() | ast.IfExp():
            yield _negate
        case ast.Return(value=ast.expr()):
            for name in variables:
                yield _replace("value", ast.Name(name, ast.Load()))
        case ast.Slice():
            for field in ("lower", "upper"):
                if getattr(node, field) is not None:
                    yield _shift(field, ast.Add)
                    yield _shift(field, ast.Sub)
    if isinstance(node, (ast.FunctionDef, ast.For, ast.While, ast.If, ast.With)):
        for field in ("body", "orelse"):
            for at, statement in enumerate(getattr(node, field, [])):
                if not is_text(statement) and not isinstance(statement, ast.Pass):
                    yield _drop(field, at)


def _replace(field, value, at=None):
    """Put a value into a field, or into place `at` of a list."""
    def change(node):
        if at is None:
            setattr(node, field, value)
        else:
            getattr(node, field)[at] = value
    return change


def _negate(node):
    node.test = ast.UnaryOp(ast.Not(), node.test)


def _shift(field, operator):
    """Add 1 to a slice's bound, or subtract it."""
    def change(node):
        setattr(node, field, ast.BinOp(getattr(node, field), operator(), ast.Constant(1)))
    return change


def _drop(field, at):
    """Leave a statement out. `pass` stands for it only where no other is left, as it would tell that a
    program was changed."""
    def change(node):
        statements = getattr(node, field)
        alone = len(statements) == 1 and field == "body"
        statements[at:at + 1] = [ast.Pass()] if alone else []
    return change
