"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const steps = data.position.length, width = data.tokens;
  const spans = document.querySelectorAll(".tokens > span");
  const slider = document.getElementById("step"), number = document.getElementById("token");
  const SHADES = 8, NOW = 32, AHEAD = 64, CHOSEN = 16;

  // A byte for each token of each step: see jaxdual/selections/steps.py.
  const levels = await unpack(data.levels);
  const rowOf = (step) => levels.subarray(step * width, (step + 1) * width);
  const isSelected = (byte) => byte >= data.selected_bit;
  const levelOf = (byte) => byte % data.selected_bit;

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function relevance(step, token) {
    const level = levelOf(rowOf(step)[token]);
    return level ? data.most[step] * 2 ** ((level - data.top_level) / data.levels_per_octave) : 0;
  }

  // The shade of each level: none up to an even share of the relevance, then in equal ratios up to the greatest.
  function shadesOf(step) {
    const octaves = Math.log2(data.most[step] * (data.position[step] + 1));
    return Array.from({ length: data.top_level + 1 }, (_, level) => {
      if (!level || octaves <= 0) return 0;
      const above = octaves + (level - data.top_level) / data.levels_per_octave;
      return Math.max(0, Math.min(SHADES, Math.ceil((SHADES * above) / octaves)));
    });
  }

  const NAMES = Array.from({ length: 128 }, (_, look) =>
    [
      look % 16 ? "shade" + (look % 16) : "",
      look & CHOSEN ? "selected" : "",
      look & NOW ? "now" : "",
      look & AHEAD ? "ahead" : "",
    ].filter(Boolean).join(" "),
  );
  const looks = new Uint8Array(width);
  let step = -1, picked = -1;

  function show(wanted) {
    const next = Math.max(0, Math.min(steps - 1, wanted));
    if (next === step) return;
    step = next;
    const row = rowOf(step), shades = shadesOf(step), position = data.position[step];
    for (let token = 0; token < width; token++) {
      const byte = row[token];
      let look = token > position ? AHEAD : shades[levelOf(byte)];
      if (isSelected(byte)) look |= CHOSEN;
      if (token === position) look |= NOW;
      if (look !== looks[token]) {
        looks[token] = look;
        spans[token].className = NAMES[look] + (token === picked ? " picked" : "");
      }
    }
    slider.value = step + 1;
    tell();
    point();
  }

  function percent(part) {
    return (100 * part).toFixed(1) + " %";
  }

  function tell() {
    const position = data.position[step], before = data.likeness[step];
    const where = position < data.prompt ? "prompt token " + position : "answer token " + (position - data.prompt);
    const text = `Step ${step + 1} of ${steps} (${where}): ${data.selected[step]} of ${position + 1} tokens selected, ` +
      `${data.raised[step]} raised, ${percent(data.mass[step])} of the relevance` +
      (before === null ? "" : `, Jaccard ${before.toFixed(2)}`);
    document.getElementById("said").textContent = text;
    slider.setAttribute("aria-valuetext", `${step + 1} of ${steps}, ${where}`);
    const shown = { selected: data.selected[step], mass: percent(data.mass[step]) };
    shown.likeness = before === null ? "none" : before.toFixed(2);
    for (const name in shown) document.querySelector(`#${name} output`).textContent = shown[name];
    describe();
  }

  function describe() {
    if (picked < 0) return;
    const part = relevance(step, picked), byte = rowOf(step)[picked];
    const often = data.position.filter((_, one) => isSelected(rowOf(one)[picked])).length;
    const what = picked > data.position[step] ? "not there yet" :
      (part ? `relevance about ${part.toPrecision(2)}` : "no relevance") +
      (isSelected(byte) ? ", selected" : ", not selected") + ` at this step`;
    document.getElementById("picked").textContent =
      `${JSON.stringify(spans[picked].textContent)}: ${what}; selected at ${often} of ${steps} steps`;
  }

  function pick(token) {
    if (picked >= 0) spans[picked].classList.remove("picked");
    picked = token;
    spans[picked].classList.add("picked");
    number.value = picked;
    describe();
  }

  function point() {
    for (const cursor of document.querySelectorAll("rect.cursor")) cursor.setAttribute("x", step);
    const line = document.querySelector(".strip .cursor");
    line.style.top = (100 * step) / steps + "%";
    line.style.height = 100 / steps + "%";
  }

  // The overview has a point for some tokens of some steps: how many of them are selected.
  function drawOverview() {
    const canvas = document.querySelector("canvas"), context = canvas.getContext("2d");
    const columns = (canvas.width = Math.min(width, 1024)), rows = (canvas.height = Math.min(steps, 256));
    const chosen = new Uint32Array(rows * columns), all = new Uint32Array(rows * columns);
    for (let one = 0; one < steps; one++) {
      const row = rowOf(one), base = Math.floor((one * rows) / steps) * columns;
      for (let token = 0; token < width; token++) {
        const place = base + Math.floor((token * columns) / width);
        all[place]++;
        if (isSelected(row[token])) chosen[place]++;
      }
    }
    const color = getComputedStyle(document.documentElement).getPropertyValue("--mark").trim();
    const channels = [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
    const image = context.createImageData(columns, rows);
    for (let place = 0; place < chosen.length; place++) {
      image.data.set(channels, 4 * place);
      image.data[4 * place + 3] = chosen[place] ? 70 + Math.round((185 * chosen[place]) / all[place]) : 0;
    }
    context.putImageData(image, 0, 0);
    document.querySelector(".strip .border").style.left = (100 * data.prompt) / width + "%";
  }

  // A place of a click within an element, from 0 to 1 both ways.
  function placeIn(element, event) {
    const box = element.getBoundingClientRect();
    const part = (value, low, size) => Math.max(0, Math.min(0.999999, (value - low) / size));
    return [part(event.clientX, box.left, box.width), part(event.clientY, box.top, box.height)];
  }

  slider.addEventListener("input", () => show(slider.valueAsNumber - 1));
  document.getElementById("back").addEventListener("click", () => show(step - 1));
  document.getElementById("on").addEventListener("click", () => show(step + 1));
  document.addEventListener("keydown", (event) => {
    if (event.target === slider || event.target === number || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    show(step + by);
  });
  const numbers = new Map(Array.from(spans, (span, token) => [span, token]));
  for (const block of document.querySelectorAll(".tokens"))
    block.addEventListener("click", (event) => {
      const token = numbers.get(event.target.closest(".tokens > span"));
      if (token !== undefined) pick(token);
    });
  function seek(token) {
    pick(token);
    spans[token].scrollIntoView({ block: "center" });
  }

  number.addEventListener("change", () => {
    const token = number.valueAsNumber;
    if (Number.isInteger(token) && token >= 0 && token < width) seek(token);
  });
  document.querySelector("canvas").addEventListener("click", (event) => {
    const [across, down] = placeIn(event.currentTarget, event);
    show(Math.floor(down * steps));
    seek(Math.floor(across * width));
  });
  for (const svg of document.querySelectorAll(".charts svg"))
    svg.addEventListener("click", (event) => show(Math.floor(placeIn(svg, event)[0] * steps)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawOverview);

  drawOverview();
  show(0);
})();
