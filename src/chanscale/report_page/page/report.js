// Moves the threshold: what it would come to is in the page for every step, so nothing is computed from images here.

const at = (id) => document.getElementById(id);

function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(1)} %` : "–";
}

function show({ true_positives, false_positives, positives, negatives, frame }, step, steps) {
  const tp = true_positives[step];
  const fp = false_positives[step];
  const [fn, tn] = [positives - tp, negatives - fp];
  const said = {
    tp, fp, fn, tn,
    "threshold-shown": (step / steps).toFixed(2),
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
  const update = () => show(counts, Math.round(slider.value * steps), steps);
  slider.value = 0.5; // a browser may have kept another from before a reload
  slider.addEventListener("input", update);
  const reset = () => {
    slider.value = 0.5;
    update();
  };
  at("reset").addEventListener("click", reset);
  // On paper there is no slider that says what the figures are of, and what is folded cannot be opened.
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
  at("chooser").hidden = false;
}

if (at("data")) start(JSON.parse(at("data").textContent));
