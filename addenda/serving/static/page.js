// The pages' own behaviour: asking about an image, where a token looked, verifying, and keeping up with the registry.
"use strict";

const find = (selector) => document.querySelector(`[data-${selector}]`);

/** An element with attributes, properties (those that start with a dot) and children. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith(".")) made[name.slice(1)] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** What the server answers, as JSON; an error carries what its problem document says. */
async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer.");
  }
  if (response.status === 401) location.assign("/login");
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.detail || `The server answered ${response.status}.`);
  return answer;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

/** Tells those who listen; where it is news, those who look too, for a while. */
function announce(text, seen = false) {
  const news = find("news");
  news.textContent = text;
  news.classList.toggle("seen", seen);
  clearTimeout(announce.fading);
  announce.fading = setTimeout(() => news.classList.remove("seen"), 10_000);
}

// ---- An image ------------------------------------------------------------------------------------------------------

const image = { file: null, bitmap: null, looking: null, asking: null, answers: null };

function openImages() {
  const drop = find("drop");
  find("file").addEventListener("change", (event) => take(event.target.files[0]));
  find("file").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return; // the space bar works by itself everywhere
    event.preventDefault();
    event.target.click();
  });
  addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }
}

async function take(file) {
  if (!file) return;
  image.file = file;
  image.bitmap = await createImageBitmap(file).catch(() => null);
  image.looking = null;
  draw();
  await answer();
  if (image.answers) announce(`${Object.keys(image.answers.tasks).length} tasks have answered.`);
}

/** Asks every task. */
async function answer() {
  image.asking?.abort();
  const { signal } = (image.asking = new AbortController());
  find("caption").textContent = "Asking every task…";
  image.answers = null;
  try {
    const body = { method: "POST", body: image.file, headers: { "Content-Type": image.file.type || "image/png" }, signal };
    image.answers = await ask("/api/v1/predict", body);
    show(image.answers);
    find("caption").textContent = "";
    if (image.looking) await look(image.looking);
  } catch (error) {
    if (error.name === "AbortError") return;
    find("answers").replaceChildren();
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
    if (!labels.length) labels.push(make("li", { class: "soft" }, "No label is likely."));
    const row = document.querySelector(`#tasks tr[data-task="${CSS.escape(name)}"]`);
    const button = make("button", { class: "quiet", "aria-pressed": "false", "data-look": name }, "Where it looked");
    button.setAttribute("aria-label", `Where ${name} looked`);
    button.addEventListener("click", () => look(image.looking === name ? null : name));
    const head = make("h3", {}, make("a", { href: `/tasks/${encodeURIComponent(name)}` }, name));
    return make("article", { class: "answer" }, make("header", {}, head, ...(row?.dataset.looks === "no" ? [] : [button])), make("ul", {}, ...labels));
  });
  const said = exact ? "exact" : "not exact";
  const count = `${cards.length} answer${cards.length === 1 ? "" : "s"}`;
  find("answers").replaceChildren(make("p", { class: "soft" }, `${count} of generation ${generation}, ${said}`), ...cards);
}

/** Draws where a task's token looked; null draws the image alone. */
async function look(name) {
  image.looking = name;
  for (const button of document.querySelectorAll("[data-look]")) {
    button.setAttribute("aria-pressed", String(button.dataset.look === name));
  }
  draw();
  find("caption").textContent = "";
  if (!name) return;
  const file = image.file;
  try {
    const options = { method: "POST", body: file, headers: { "Content-Type": file.type || "image/png" } };
    const map = await ask(`/page/attention?task=${encodeURIComponent(name)}`, options);
    if (image.looking !== name || image.file !== file) return;
    draw(map);
    const share = map.weights.reduce((sum, weight) => sum + weight, 0);
    find("caption").textContent =
      `${map.ref} spent ${percent(share)} of its attention in the last layer on the image, most of it where it glows; ` +
      "the rest went to its own memory and other tokens.";
  } catch (error) {
    find("caption").textContent = error.message;
  }
}

/** The image, and on it a map of attention where there is one. */
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
  context.imageSmoothingEnabled = scale < 4; // a small image shows its pixels
  context.drawImage(bitmap, 0, 0, width, height);
  canvas.dataset.shows = map ? map.task : "";
  canvas.setAttribute("aria-label", map ? `The image, and where ${map.task} looked in it` : "The image");
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

/** One pixel for each patch: clear where nothing was looked at, then red, orange and pale yellow. */
function heat({ rows, columns, weights }) {
  const made = make("canvas", { width: columns, height: rows });
  const context = made.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const most = Math.max(...weights) || 1;
  weights.forEach((weight, i) => {
    const share = weight / most;
    pixels.data.set([255, 255 * Math.min(1, 0.12 + share * 0.85), 200 * Math.max(0, share - 0.4), 235 * share ** 0.8], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  return made;
}

// ---- The registry --------------------------------------------------------------------------------------------------

/** Keeps the list of tasks as new as what is served. */
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
  const shown = find("generation");
  if (Number(shown.textContent) === generation) return;
  const old = document.getElementById("tasks");
  if (!old) {
    shown.textContent = generation;
    return;
  }
  const response = await fetch("/page/tasks");
  if (!response.ok || response.redirected) return;
  const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
  const fresh = document.adoptNode(parsed.getElementById("tasks"));
  const refs = (part) => [...part.querySelectorAll("tr[data-ref]")].map((row) => row.dataset.ref);
  const [before, now] = [refs(old), refs(fresh)];
  const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  for (const row of fresh.querySelectorAll("tr[data-ref]")) row.classList.toggle("new", !before.includes(row.dataset.ref));
  old.replaceWith(fresh);
  if (focused) fresh.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  shown.textContent = fresh.dataset.generation;
  const come = now.filter((ref) => !before.includes(ref));
  const gone = before.filter((ref) => !now.includes(ref));
  const told = [come.length ? `Now served: ${come.join(", ")}.` : "", gone.length ? `No longer served: ${gone.join(", ")}.` : ""];
  announce([...told, `Generation ${fresh.dataset.generation}.`].filter(Boolean).join(" "), true);
  if (image.file && (come.length || gone.length)) await answer();
}

// ---- Verification --------------------------------------------------------------------------------------------------

function openVerification() {
  find("verify").addEventListener("click", verify);
  showVerifications();
}

async function verify() {
  const button = find("verify");
  button.setAttribute("aria-disabled", "true");
  find("progress").textContent = "Computing every task's probe again…";
  try {
    const { generation, ok, tasks } = await ask("/api/v1/verify", { method: "POST" });
    const head = ok ? `All ${tasks.length} tasks kept the promise` : "The promise is broken";
    const rows = tasks.map((one) => [one.task, tag(one.ok ? "kept" : "broken", one.ok), one.detail]);
    find("verdicts").replaceChildren(
      make("p", { class: ok ? "verdict" : "verdict broken" }, `${head}, generation ${generation}.`),
      ...(rows.length ? [table(["Task", "Promise", "What came out"], rows)] : []),
    );
  } catch (error) {
    find("verdicts").replaceChildren(make("p", { class: "verdict broken" }, error.message));
  }
  find("progress").textContent = "";
  button.removeAttribute("aria-disabled");
  await showVerifications();
}

async function showVerifications() {
  const all = await ask("/api/v1/verifications").catch(() => null);
  if (!all?.length) return;
  const rows = all.map((one) => {
    const failed = (one.tasks || []).filter((task) => !task.ok).map((task) => task.task);
    const at = one.at || "";
    const said = failed.length ? failed.join(", ") : one.detail || `${(one.tasks || []).length} tasks`;
    return [at.slice(0, 19).replace("T", " "), String(one.generation), tag(one.ok ? "kept" : "broken", one.ok), said];
  });
  find("verifications").replaceChildren(table(["When (UTC)", "Generation", "Promise", "Tasks"], rows));
}

const tag = (text, good) => make("span", { class: `tag ${good ? "good" : "bad"}` }, text);

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
