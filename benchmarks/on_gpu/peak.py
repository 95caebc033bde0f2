"""The rate of the largest products, which no model can pass."""

from on_gpu.lab import Lab, median


def measure(lab: Lab) -> bool:
    """Keeps FLOP/s by rows of the matrices, and the largest."""
    found = {n: lab.run(lab.job("product", n=n)) for n in lab.size.products}
    rates = {n: 2 * n**3 / median(one) for n, one in found.items() if "gap" not in one}
    gaps = {str(n): one["gap"] for n, one in found.items() if "gap" in one}
    lab.report.keep("peak", rates=rates, rate=max(rates.values(), default=None), gaps=gaps)
    for n, of_n in rates.items():
        lab.console.print(f"products of {n:,} × {n:,} in bfloat16: {of_n / 1e12:,.3g} TFLOP/s{share_of(lab, of_n)}")
    return bool(rates)


def share_of(lab: Lab, rate: float) -> str:
    sheet = lab.report.head["peak"]
    return "" if sheet is None else f", {rate / sheet:.1%} of the data sheet's {sheet / 1e12:g}"
