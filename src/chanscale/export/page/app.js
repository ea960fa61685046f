// Classifies images with the model beside this page. All of it runs in this page, and not in a worker: the content
// security policy of index.html, by which nothing can leave, would not hold there.

const LARGEST = 40e6; // pixels of an image
const STRIP = 256; // rows that are read at once: browsers limit the size of a canvas
const SHOWN = 1024; // pixels of the longer side of what is drawn
const FAINTER = 0.95; // share of a map that is fainter than full colour: its padded corners can outdo all the rest
const FOR = [224, 82, 6]; // red, green and blue; style.css has both for the legend
const AGAINST = [20, 110, 220];

const at = (id) => document.getElementById(id);

// An error whose message is a sentence for who uses the page.
class Refusal extends Error {}

// Await `work`; whatever goes wrong there is told as `sentence`.
async function telling(sentence, work) {
  try {
    return await work();
  } catch (error) {
    if (error instanceof Refusal) throw error;
    console.debug(error);
    throw new Refusal(sentence);
  }
}

function say(sentence, state) {
  at("status").textContent = sentence;
  at("status").dataset.state = state;
}

// ---- the model

async function load() {
  say("Loading the model …", "busy");
  const about = await telling(missing("model.json"), async () => (await get("model.json")).json());
  describe(about);
  const ort = await telling(missing("the runtime (ort.wasm.min.js)"), () => import("./ort.wasm.min.js"));
  const bytes = await telling(missing("model.onnx"), async () => (await get("model.onnx")).arrayBuffer());
  const sentence = "The model could not be started: this browser may lack WebAssembly, or memory, or files are missing.";
  const session = await telling(sentence, () => start(ort, bytes));
  say("Ready.", "ready");
  return { about, ort, session };
}

const missing = (what) => `${what} could not be loaded: put the whole folder on the server, and reload this page.`;

async function get(file) {
  const response = await fetch(new URL(file, import.meta.url));
  if (!response.ok) throw new Error(`${file}: ${response.status}`);
  return response;
}

function start(ort, bytes) {
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1; // more need headers that a static server does not send
  ort.env.wasm.wasmPaths = {
    mjs: new URL("ort-wasm-simd-threaded.js", import.meta.url).href,
    wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href,
  };
  return ort.InferenceSession.create(new Uint8Array(bytes), { executionProviders: ["wasm"] });
}

function describe({ name, classes, multilabel, notice, bytes, runtime }) {
  document.title = name;
  at("name").textContent = name;
  const listed = classes.length > 6 ? `${classes.length} classes` : classes.join(multilabel ? ", " : " or ");
  at("about").textContent = `${listed} · a model of ${(bytes / 1e6).toPrecision(3)} MB`;
  if (multilabel) at("heading").textContent = "More probable than not";
  at("notice").textContent = notice;
  at("notice").hidden = !notice || notice === at("research").textContent;
  at("made-with").textContent = `Runs with ${runtime}, on one processor core.`;
}

// ---- an image

// Pixels as a file reader gives them: upright, without colour management or premultiplied alpha.
async function decode(file) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
  const sentence = `${file.name} is not an image that this browser can read; choose a PNG or a JPEG.`;
  const bitmap = await telling(sentence, () => createImageBitmap(file, options));
  const pixels = bitmap.width * bitmap.height;
  if (pixels <= LARGEST) return bitmap;
  bitmap.close();
  const size = `${(pixels / 1e6).toFixed(0)} megapixels`;
  throw new Refusal(`${file.name} has ${size}; choose an image of at most ${LARGEST / 1e6}.`);
}

// Planes of red, green and blue, 0 to 255, and what is known of them.
function readPixels(bitmap) {
  const { width, height } = bitmap;
  const planes = new Float32Array(3 * width * height);
  const found = { planes, width, height, grey: true, opaque: true };
  const canvas = new OffscreenCanvas(width, Math.min(STRIP, height));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  for (let top = 0; top < height; top += STRIP) {
    const rows = Math.min(STRIP, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, rows, 0, 0, width, rows);
    readStrip(context.getImageData(0, 0, width, rows).data, top * width, found);
  }
  return found;
}

function readStrip(data, start, found) {
  const { planes, width, height } = found;
  const green = width * height;
  for (let from = 0, to = start; from < data.length; from += 4, to += 1) {
    planes[to] = data[from];
    planes[to + green] = data[from + 1];
    planes[to + 2 * green] = data[from + 2];
    if (data[from] !== data[from + 1] || data[from] !== data[from + 2]) found.grey = false;
    if (data[from + 3] !== 255) found.opaque = false;
  }
}

function toTensor(pixels, name, { about, ort }) {
  const { planes, width, height, grey, opaque } = pixels;
  if (!opaque) throw new Refusal(`${name} has transparent pixels; save it without them.`);
  if (!grey && about.grey_only) throw new Refusal(`${name} has colours; this model takes grey images only.`);
  const channels = grey ? 1 : 3;
  const values = planes.subarray(0, channels * width * height);
  return new ort.Tensor("float32", values, [1, channels, height, width]);
}

// ---- the answer

let shown = null; // the answer on the page: classes, winner and map

async function classify(file) {
  const model = await ready;
  say(`Reading ${file.name} …`, "busy");
  await new Promise((resolve) => setTimeout(resolve, 30)); // what is said is painted before the page is busy
  const started = performance.now();
  const bitmap = await decode(file);
  try {
    const pixels = await telling(`${file.name} needs more memory than there is.`, () => readPixels(bitmap));
    const tensor = toTensor(pixels, file.name, model);
    const outputs = await telling(`The model failed on ${file.name}; try a smaller image.`, () =>
      model.session.run({ pixels: tensor }));
    show(file, bitmap, pixels, outputs, model.about);
    const seconds = (performance.now() - started) / 1000;
    at("seconds").textContent = `${pixels.width} × ${pixels.height} pixels, ${seconds.toFixed(2)} seconds`;
  } finally {
    bitmap.close();
  }
}

function show(file, bitmap, pixels, outputs, about) {
  const shares = Array.from(outputs.probabilities.data);
  const winner = shares.indexOf(Math.max(...shares));
  shown = { classes: about.classes, winner, map: outputs.class_map };
  const called = callOf(shares, winner, about);
  const verdict = called.map((index) => about.classes[index]).join(", ") || "none of the labels";
  at("verdict").textContent = verdict;
  at("file-name").textContent = file.name;
  at("colours").hidden = pixels.grey || about.channels !== 1;
  at("bars").replaceChildren(...ranked(shares).map((index) => bar(about.classes[index], shares[index], called.includes(index))));
  const rules = readByRules(shares, winner, about);
  at("rules").textContent = rules.join(" ");
  at("rules").hidden = !rules.length;
  at("result").hidden = false;
  document.body.classList.add("answered");
  drawImage(bitmap, file.name);
  showEvidence();
  const answer = `${verdict}${about.multilabel ? "" : `, ${percent(shares[winner])}`}.`;
  say([`${file.name}: ${answer}`, ...rules].join(" "), "done");
}

// The most probable class; of several labels, those that are more probable than not.
function callOf(shares, winner, about) {
  return about.multilabel ? [...shares.keys()].filter((index) => shares[index] > 0.5) : [winner];
}

// What the operating point and the prediction sets of the model come to, where it has them: a sentence each.
function readByRules(shares, winner, { classes, operating_point: point, prediction_sets: sets }) {
  const said = [];
  if (point) {
    const from = `${classes[1]} from ${(100 * point.threshold).toPrecision(3)} % on`;
    const called = shares[1] >= point.threshold ? "Positive" : "Not positive";
    said.push(`${called} at the operating point (${from}, for a sensitivity of ${point.sensitivity}).`);
  }
  if (sets) {
    const held = classes.filter((_, index) => shares[index] >= sets.least[index] || index === winner);
    said.push(`Not ruled out, for a coverage of ${sets.coverage}: ${held.join(", ")}.`);
  }
  return said;
}

// The model's order while it can be taken in at a glance, else the most probable first.
function ranked(shares) {
  const order = [...shares.keys()];
  return order.length > 6 ? order.sort((a, b) => shares[b] - shares[a]) : order;
}

function bar(name, share, wins) {
  const [item, label, figure, track, fill] = ["li", "span", "span", "div", "div"].map((tag) => document.createElement(tag));
  item.dataset.probability = share;
  item.className = wins ? "wins" : "";
  label.textContent = name;
  figure.textContent = percent(share);
  fill.style.width = `${100 * share}%`;
  track.className = "track";
  track.append(fill);
  item.append(label, figure, track);
  return item;
}

// Never 100 % or 0 %: a model is not that sure.
function percent(share) {
  if (share > 0.999) return "> 99.9 %";
  return share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

function drawImage(bitmap, name) {
  const canvas = at("image");
  const { width, height } = bitmap;
  const ratio = SHOWN / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.parentElement.style.setProperty("--ratio", width / height);
  canvas.setAttribute("aria-label", `The image ${name}`);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

// ---- the class map

function showEvidence() {
  at("evidence").hidden = at("map").hidden = !shown.map;
  if (!shown.map) return;
  const several = shown.map.dims[1] > 1;
  at("choice").hidden = !several;
  if (several) offerClasses();
  drawMap();
}

function offerClasses() {
  at("map-class").replaceChildren(...shown.classes.map((name, index) => new Option(name, index)));
  at("map-class").value = shown.winner;
}

// The evidence for one class: that of the second of two, or the one chosen.
function drawMap() {
  const [, maps, height, width] = shown.map.dims;
  const index = maps > 1 ? Number(at("map-class").value) : 0;
  const evidence = shown.map.data.subarray(index * height * width, (index + 1) * height * width);
  const sizes = evidence.map(Math.abs).sort();
  const full = sizes[Math.floor(FAINTER * (sizes.length - 1))] || sizes.at(-1);
  paint(at("map"), evidence, width, height, full);
  nameEvidence(index, evidence, full);
}

function paint(canvas, evidence, width, height, full) {
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  evidence.forEach((value, index) => {
    const strength = full ? Math.min(1, Math.abs(value) / full) : 0;
    pixels.data.set([...(value > 0 ? FOR : AGAINST), 255 * strength], 4 * index);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function nameEvidence(index, evidence, full) {
  const { classes, map } = shown;
  const two = map.dims[1] === 1;
  const mean = evidence.reduce((sum, value) => sum + value, 0) / evidence.length;
  at("against").textContent = `≤ −${full.toFixed(1)} ${two ? classes[0] : `not ${classes[index]}`}`;
  at("for").textContent = `≥ +${full.toFixed(1)} ${classes[two ? 1 : index]}`;
  const answer = two ? `the log-odds of ${classes[1]}` : `the logit of ${classes[index]}`;
  at("mean").textContent = `Where the evidence lies. Its mean over the image, ${signed(mean)}, is ${answer}.`;
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

function fade() {
  at("map").style.opacity = at("show-map").checked ? at("opacity").value / 100 : 0;
}

// ---- what people do

let queue = Promise.resolve();

// One image after the other, in the order in which they came.
function take(files) {
  if (files.length > 1) complain(new Refusal(`Got ${files.length} files; give one image at a time.`));
  else if (files.length) queue = queue.then(() => classify(files[0])).catch(complain);
}

function complain(error) {
  if (!(error instanceof Refusal)) console.debug(error);
  at("result").hidden = true; // an earlier answer is not one to this image
  say(error instanceof Refusal ? error.message : "Something went wrong; reload this page.", "error");
}

at("file").addEventListener("change", (event) => {
  take([...event.target.files]);
  event.target.value = ""; // the same file can then be chosen again
});
addEventListener("paste", (event) => take(event.clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault(); // a browser would open the file in place of this page
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dragging"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files);
});
at("show-map").addEventListener("change", fade);
at("opacity").addEventListener("input", fade);
at("map-class").addEventListener("change", drawMap);

fade();
const ready = load();
ready.catch(complain);
