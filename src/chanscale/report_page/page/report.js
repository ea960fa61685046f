// Moves the threshold: what it would come to is in the page for every step, so nothing is computed from images here.

const at = (id) => document.getElementById(id);

function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(1)} %` : "–";
}

function write(threshold) {
  return threshold === 0.5 ? "0.50" : threshold.toFixed(3);
}

function show({ positives, negatives, frame }, threshold, tp, fp) {
  const [fn, tn] = [positives - tp, negatives - fp];
  const said = {
    tp, fp, fn, tn,
    "threshold-shown": threshold,
    sensitivity: percent(tp, positives),
    specificity: percent(tn, negatives),
    ppv: percent(tp, tp + fp),
    npv: percent(tn, tn + fn),
  };
  for (const [id, text] of Object.entries(said)) at(id).textContent = text;
  const point = at("roc-point");
  if (!point) return;
  point.setAttribute("cx", frame.left + (frame.width * fp) / negatives);
  point.setAttribute("cy", frame.top + frame.height * (1 - tp / positives));
}

function start(counts) {
  const slider = at("threshold");
  const steps = counts.true_positives.length - 1;
  const { threshold, true_positives, false_positives } = counts.start;
  const update = () => {
    const step = Math.round(slider.value * steps);
    const shown = (step / steps).toFixed(2);
    show(counts, shown, counts.true_positives[step], counts.false_positives[step]);
  };
  const reset = () => {
    slider.value = threshold; // the nearest step; what is shown is exact
    show(counts, write(threshold), true_positives, false_positives);
  };
  reset(); // a browser may have kept another place from before a reload
  slider.addEventListener("input", update);
  at("reset").addEventListener("click", reset);
  // On paper there is no slider that says what the figures are of, and what is folded cannot be opened.
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
  at("chooser").hidden = false;
}

if (at("data")) start(JSON.parse(at("data").textContent));
