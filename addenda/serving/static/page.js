// Behaviour of the pages: predictions, attention maps, verification and live updates.
"use strict";

const find = (selector) => document.querySelector(`[data-${selector}]`);

/** Creates an element with attributes, properties (names that start with a dot) and children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith(".")) element[name.slice(1)] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Sends a request and returns the JSON response; an error has the detail of the problem document. */
async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.status === 401) location.assign("/login");
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail || `The server returned status ${response.status}.`);
  return body;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

/** Announces a text to screen readers; if `visible`, also shows it for a while. */
function announce(text, visible = false) {
  const news = find("news");
  news.textContent = text;
  news.classList.toggle("visible", visible);
  clearTimeout(announce.fading);
  announce.fading = setTimeout(() => news.classList.remove("visible"), 10_000);
}

// ---- Predictions ---------------------------------------------------------------------------------------------------

const image = { file: null, bitmap: null, attentionTask: null, pending: null, predictions: null };

function openImages() {
  const drop = find("drop");
  find("file").addEventListener("change", (event) => load(event.target.files[0]));
  find("file").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return; // the space bar works without this
    event.preventDefault();
    event.target.click();
  });
  addEventListener("paste", (event) => load(event.clipboardData.files[0]));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") load(event.dataTransfer.files[0]);
    });
  }
}

async function load(file) {
  if (!file) return;
  image.file = file;
  image.bitmap = await createImageBitmap(file).catch(() => null);
  image.attentionTask = null;
  draw();
  await predict();
  if (image.predictions) announce(`Predictions of ${Object.keys(image.predictions.tasks).length} tasks are shown.`);
}

/** Predicts for the image with every task. */
async function predict() {
  image.pending?.abort();
  const { signal } = (image.pending = new AbortController());
  find("caption").textContent = "Predicting…";
  image.predictions = null;
  try {
    const options = { method: "POST", body: image.file, headers: { "Content-Type": image.file.type || "image/png" }, signal };
    image.predictions = await request("/api/v1/predict", options);
    show(image.predictions);
    find("caption").textContent = "";
    if (image.attentionTask) await showAttention(image.attentionTask);
  } catch (error) {
    if (error.name === "AbortError") return;
    find("predictions").replaceChildren();
    find("caption").textContent = error.message;
  }
}

function show({ generation, exact, tasks }) {
  const cards = Object.entries(tasks).map(([name, task]) => {
    const labels = task.labels.map(({ label, probability }) => {
      const bar = make("span", { class: "bar" });
      bar.style.setProperty("--share", probability);
      return make("li", {}, make("span", { class: "label" }, label), bar, make("span", { class: "number" }, percent(probability)));
    });
    if (!labels.length) labels.push(make("li", { class: "soft" }, "No label predicted."));
    const row = document.querySelector(`#tasks tr[data-task="${CSS.escape(name)}"]`);
    const button = make("button", { class: "quiet", "aria-pressed": "false", "data-attention": name }, "Show attention");
    button.setAttribute("aria-label", `Show attention of ${name}`);
    button.addEventListener("click", () => showAttention(image.attentionTask === name ? null : name));
    const head = make("h3", {}, make("a", { href: `/tasks/${encodeURIComponent(name)}` }, name));
    const buttons = row?.dataset.hasToken === "no" ? [] : [button];
    return make("article", { class: "prediction" }, make("header", {}, head, ...buttons), make("ul", {}, ...labels));
  });
  const exactness = exact ? "exact" : "not exact";
  const count = `${cards.length} prediction${cards.length === 1 ? "" : "s"}`;
  const summary = `${count} from generation ${generation}, ${exactness}`;
  find("predictions").replaceChildren(make("p", { class: "soft" }, summary), ...cards);
}

/** Draws the attention map of a task's class token; null draws the image only. */
async function showAttention(name) {
  image.attentionTask = name;
  for (const button of document.querySelectorAll("[data-attention]")) {
    button.setAttribute("aria-pressed", String(button.dataset.attention === name));
  }
  draw();
  find("caption").textContent = "";
  if (!name) return;
  const file = image.file;
  try {
    const options = { method: "POST", body: file, headers: { "Content-Type": file.type || "image/png" } };
    const map = await request(`/page/attention?task=${encodeURIComponent(name)}`, options);
    if (image.attentionTask !== name || image.file !== file) return;
    draw(map);
    const share = map.weights.reduce((sum, weight) => sum + weight, 0);
    find("caption").textContent =
      `In the last layer, the class token of ${map.ref} puts ${percent(share)} of its attention on the image; ` +
      "the heat map shows where. The rest is on its memory and other tokens.";
  } catch (error) {
    find("caption").textContent = error.message;
  }
}

/** Draws the image, overlaid with an attention map if given. */
function draw(map) {
  const canvas = find("canvas");
  const { bitmap } = image;
  canvas.hidden = !bitmap;
  find("drop").classList.toggle("small", Boolean(bitmap));
  if (!bitmap) return;
  const scale = 720 / Math.max(bitmap.width, bitmap.height);
  const width = (canvas.width = Math.max(1, Math.round(bitmap.width * scale)));
  const height = (canvas.height = Math.max(1, Math.round(bitmap.height * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale < 4; // keeps the pixels of a small image sharp
  context.drawImage(bitmap, 0, 0, width, height);
  canvas.dataset.shows = map ? map.task : "";
  canvas.setAttribute("aria-label", map ? `The image with the attention map of ${map.task}` : "The image");
  if (!map) return;
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "#808080";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "rgba(8, 10, 24, 0.4)";
  context.fillRect(0, 0, width, height);
  const [left, top, across, down] = map.box;
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(heat(map), left * width, top * height, across * width, down * height);
}

/** A canvas with one pixel per patch: transparent for no attention, then red, orange and pale yellow. */
function heat({ rows, columns, weights }) {
  const canvas = make("canvas", { width: columns, height: rows });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const maximum = Math.max(...weights) || 1;
  weights.forEach((weight, i) => {
    const share = weight / maximum;
    pixels.data.set([255, 255 * Math.min(1, 0.12 + share * 0.85), 200 * Math.max(0, share - 0.4), 235 * share ** 0.8], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// ---- Live updates --------------------------------------------------------------------------------------------------

/** Updates the task list whenever another generation is served. */
function follow() {
  const events = new EventSource("/api/v1/events");
  events.addEventListener("generation", (event) => refresh(JSON.parse(event.data).generation));
  events.addEventListener("error", () => {
    if (events.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
  });
}

let refreshing = Promise.resolve();

function refresh(generation) {
  refreshing = refreshing.then(() => replaceTasks(generation)).catch(() => {});
}

async function replaceTasks(generation) {
  const label = find("generation");
  if (Number(label.textContent) === generation) return;
  const oldList = document.getElementById("tasks");
  if (!oldList) {
    label.textContent = generation;
    return;
  }
  const response = await fetch("/page/tasks");
  if (!response.ok || response.redirected) return;
  const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
  const newList = document.adoptNode(parsed.getElementById("tasks"));
  const refsOf = (list) => [...list.querySelectorAll("tr[data-ref]")].map((row) => row.dataset.ref);
  const [oldRefs, newRefs] = [refsOf(oldList), refsOf(newList)];
  const focused = oldList.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  for (const row of newList.querySelectorAll("tr[data-ref]")) row.classList.toggle("new", !oldRefs.includes(row.dataset.ref));
  oldList.replaceWith(newList);
  if (focused) newList.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  label.textContent = newList.dataset.generation;
  const added = newRefs.filter((ref) => !oldRefs.includes(ref));
  const removed = oldRefs.filter((ref) => !newRefs.includes(ref));
  const changes = [added.length ? `Now served: ${added.join(", ")}.` : "", removed.length ? `No longer served: ${removed.join(", ")}.` : ""];
  announce([...changes, `Generation ${newList.dataset.generation}.`].filter(Boolean).join(" "), true);
  if (image.file && (added.length || removed.length)) await predict();
}

// ---- Verification --------------------------------------------------------------------------------------------------

function openVerification() {
  find("verify").addEventListener("click", verify);
  showVerifications();
}

async function verify() {
  const button = find("verify");
  button.setAttribute("aria-disabled", "true");
  find("progress").textContent = "Recomputing all golden probes…";
  try {
    const { generation, ok, tasks } = await request("/api/v1/verify", { method: "POST" });
    const summary = ok ? `The golden probes of all ${tasks.length} tasks match` : "Verification failed";
    const rows = tasks.map((task) => [task.task, resultTag(task.ok), task.detail]);
    find("verdicts").replaceChildren(
      make("p", { class: ok ? "verdict" : "verdict failed" }, `${summary} (generation ${generation}).`),
      ...(rows.length ? [table(["Task", "Result", "Details"], rows)] : []),
    );
  } catch (error) {
    find("verdicts").replaceChildren(make("p", { class: "verdict failed" }, error.message));
  }
  find("progress").textContent = "";
  button.removeAttribute("aria-disabled");
  await showVerifications();
}

async function showVerifications() {
  const verifications = await request("/api/v1/verifications").catch(() => null);
  if (!verifications?.length) return;
  const rows = verifications.map((verification) => {
    const { at = "", generation, ok, tasks = [], detail } = verification;
    const failed = tasks.filter((task) => !task.ok).map((task) => task.task);
    const summary = failed.length ? failed.join(", ") : detail || `${tasks.length} tasks`;
    return [at.slice(0, 19).replace("T", " "), String(generation), resultTag(ok), summary];
  });
  find("verifications").replaceChildren(table(["Time (UTC)", "Generation", "Result", "Tasks"], rows));
}

const resultTag = (ok) => make("span", { class: `tag ${ok ? "good" : "bad"}` }, ok ? "passed" : "failed");

function table(columns, rows) {
  const head = make("tr", {}, ...columns.map((column) => make("th", { scope: "col" }, column)));
  const body = rows.map((row) =>
    make("tr", {}, ...row.map((cell, i) => make(i ? "td" : "th", i ? { "data-label": columns[i] } : { scope: "row" }, cell))),
  );
  return make("table", { class: "stacked" }, make("thead", {}, head), make("tbody", {}, ...body));
}

if (find("file")) openImages();
if (find("verify")) openVerification();
follow();
