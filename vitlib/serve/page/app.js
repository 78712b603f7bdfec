// Classifies photos, and shows bars of scores and the model's attention. Each photo is a request of
// its own, so that a bad photo does not affect the others; a few requests run at a time. Every text
// is in index.html.
"use strict";

const MAX_REQUESTS = 4;
const byId = (id) => document.getElementById(id);
const [about, drop, pick, progress, answers] =
  ["about", "drop", "pick", "progress", "answers"].map(byId);
const keyLine = byId("key-line");
const key = byId("key");
const texts = JSON.parse(byId("texts").textContent);
let model = { answers: [] };
let waiting = [];
let running = 0;
let added = 0;

// Returns a text of the page with its values.
function say(name, values = {}) {
  return texts[name].replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

function sayCount(name, n) {
  return say(n === 1 ? `${name}One` : name, { n });
}

function headers(more) {
  return key.value ? { ...more, Authorization: `Bearer ${key.value}` } : more;
}

async function post(path, file) {
  const start = performance.now();
  const type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
  const options = { method: "POST", body: file, headers: headers({ "Content-Type": type }) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error(say("noAnswer"));
  }
  const body = await answer.json().catch(() => ({}));
  if (answer.status === 401) {
    keyLine.hidden = false;
    key.focus();
  }
  if (!answer.ok) {
    throw new Error(body.error ? body.error.message : say("status", { status: answer.status }));
  }
  return [body, performance.now() - start];
}

function isRegression() {
  return model.task === "regression";
}

function row(prediction) {
  const line = document.createElement("tr");
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = prediction.label;
  const cell = document.createElement("td");
  const score = document.createElement("td");
  score.className = "score";
  if (isRegression()) { // numbers without bounds have no bar
    score.textContent = String(Number(prediction.score.toPrecision(6)));
    line.append(name, cell, score);
    return line;
  }
  const bar = document.createElement("meter");
  bar.value = prediction.score;
  bar.textContent = prediction.score.toFixed(3);
  bar.setAttribute("aria-label", prediction.label);
  cell.append(bar);
  score.textContent = prediction.score.toFixed(3);
  line.append(name, cell, score);
  return line;
}

// Draws the map over the part of the photo that the model sees: `box` is top, left, bottom, right, as
// shares of the photo.
function overlay(canvas, image, map, box) {
  const small = document.createElement("canvas");
  [small.height, small.width] = [map.length, map[0].length];
  const pen = small.getContext("2d");
  const pixels = pen.createImageData(small.width, small.height);
  map.flat().forEach((value, i) => {
    pixels.data.set([255, 80 + 150 * value, 20, 30 + 200 * value], 4 * i);
  });
  pen.putImageData(pixels, 0, 0);
  const photo = displayedBox(image);
  const [top, left, bottom, right] = box;
  canvas.style.left = `${photo.x + left * photo.width}px`;
  canvas.style.top = `${photo.y + top * photo.height}px`;
  canvas.width = Math.max(1, Math.round((right - left) * photo.width));
  canvas.height = Math.max(1, Math.round((bottom - top) * photo.height));
  const large = canvas.getContext("2d");
  large.imageSmoothingQuality = "high";
  large.drawImage(small, 0, 0, canvas.width, canvas.height);
}

// Returns the box of the photo within its element, which keeps its aspect ratio (object-fit: contain).
function displayedBox(image) {
  const scale = Math.min(
    image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  return {
    x: (image.clientWidth - width) / 2, y: (image.clientHeight - height) / 2, width, height,
  };
}

function addAttention(item, file, image) {
  const button = item.querySelector(".attention");
  const method = item.querySelector(".method");
  const canvas = item.querySelector("canvas");
  if (!model.answers.includes("attend")) {
    button.hidden = method.hidden = true;
    return;
  }
  const hasBest = model.classes && !isRegression();
  for (const option of method.options) {
    option.disabled = !hasBest && ["relevance", "gradient"].includes(option.value);
  }
  button.disabled = method.disabled = false;
  let attention = null;
  let loading = false;
  const draw = () => attention && !canvas.hidden &&
    overlay(canvas, image, attention.maps[0], attention.shown[0]);
  // The controls stay enabled meanwhile: a disabled one would lose the focus of the keyboard.
  const load = async () => {
    const photo = item.querySelector(".photo");
    loading = true;
    photo.setAttribute("aria-busy", "true");
    try {
      let chosen;
      do {
        chosen = method.value;
        [attention] = await post(`attend?method=${chosen}`, file);
      } while (chosen !== method.value);
      const name = method.selectedOptions[0].textContent;
      canvas.setAttribute("aria-label", say("map", { method: name }));
      item.querySelector(".error").hidden = true;
      return true;
    } catch (error) {
      fail(item, error);
      return false;
    } finally {
      loading = false;
      photo.setAttribute("aria-busy", "false");
    }
  };
  button.addEventListener("click", async () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    if (loading || (on && !attention && !await load())) {
      return;
    }
    button.setAttribute("aria-pressed", String(on));
    canvas.hidden = !on;
    draw();
  });
  method.addEventListener("change", async () => {
    attention = null;
    if (!loading && !canvas.hidden && await load()) {
      draw();
    }
  });
  new ResizeObserver(draw).observe(image);
}

function fail(item, error) {
  const line = item.querySelector(".error");
  line.textContent = error.message;
  line.hidden = false;
}

async function show(file, item) {
  const image = item.querySelector("img");
  const caption = item.querySelector("figcaption");
  caption.textContent = file.name;
  added += 1;
  caption.id = `photo-${added}`;
  for (const control of item.querySelectorAll("button, select")) {
    control.setAttribute("aria-describedby", caption.id);
  }
  image.alt = file.name;
  image.src = URL.createObjectURL(file);
  image.addEventListener("error", () => { image.hidden = true; });
  try {
    await loaded;
    if (model.answers.includes("classify")) {
      const [result, milliseconds] = await post("classify", file);
      item.querySelector("tbody").append(...result.predictions[0].map(row));
      item.querySelector(".time").textContent = say("time", { n: Math.round(milliseconds) });
    } else {
      item.querySelector(".time").textContent = say("noLabels");
    }
    addAttention(item, file, image);
  } catch (error) {
    item.querySelector(".tools").hidden = true;
    fail(item, error);
  }
}

function next() {
  while (running < MAX_REQUESTS && waiting.length) {
    const [file, item] = waiting.shift();
    running += 1;
    show(file, item).finally(() => {
      running -= 1;
      next();
    });
  }
  const remaining = waiting.length + running;
  progress.textContent = remaining ? sayCount("remaining", remaining) : "";
  if (!remaining && answers.children.length) {
    progress.textContent = sayCount("answered", answers.children.length);
  }
}

function add(files) {
  const template = byId("answer").content.firstElementChild;
  for (const file of [...files].reverse()) {
    const item = template.cloneNode(true);
    answers.prepend(item);
    waiting.unshift([file, item]);
  }
  next();
}

pick.addEventListener("change", () => {
  add(pick.files);
  pick.value = "";
});
byId("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  add(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    add(event.clipboardData.files);
  }
});

const loaded = (async () => {
  try {
    model = await (await fetch("version")).json();
    const kind = say(isRegression() ? "outputs" : "classes");
    const labelled = model.calibration ? "aboutCalibrated" : "about";
    const values = { model: model.model, n: model.classes, kind, task: model.task };
    about.textContent = say(model.classes ? labelled : "aboutWithoutLabels", values);
  } catch {
    about.textContent = say("noAnswer");
  }
})();
