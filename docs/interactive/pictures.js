// What the three pages share: the language, the sliders, a little drawing. Each page has its own formulas.

const get = (id) => document.getElementById(id);
const shown = (x, digits = 3) => (x < 0 ? "−" : "") + Math.abs(x).toFixed(digits);

// An element with data-zh has its Chinese text there, and its English text inside.
function show_language(language) {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-zh]")) {
    element.dataset.en ??= element.innerHTML;
    element.innerHTML = element.dataset[language];
  }
  get("language").textContent = language === "en" ? "中文" : "English";
  draw();
}

const say = (english, chinese) => (document.documentElement.lang === "zh" ? chinese : english);

// {name: number} of all sliders; each shows its value in the <output> beside it.
function sliders() {
  const values = {};
  for (const slider of document.querySelectorAll("input[type=range]")) {
    values[slider.id] = Number(slider.value);
    slider.parentElement.querySelector("output").textContent = slider.value;
  }
  return values;
}

function path(points, kind) {
  return `<path class="${kind}" d="M${points.map((point) => point.map((x) => x.toFixed(1)).join(" ")).join("L")}"/>`;
}

// Bars on both sides of a line of zeros. Each has a label below and its value at its end.
function bars(values, labels, reach) {
  const width = 480 / values.length;
  const parts = [`<path class="axis" d="M0 90H480"/>`];
  values.forEach((value, i) => {
    if (value === undefined) return;
    const height = (80 * Math.abs(value)) / reach;
    const x = i * width;
    const y = value < 0 ? 90 : 90 - height;
    const middle = `x="${x + width / 2}" text-anchor="middle"`;
    parts.push(`<rect class="${value < 0 ? "bad" : "good"}" x="${x + width * 0.2}" y="${y}" width="${width * 0.6}" height="${height}"/>`);
    parts.push(`<text ${middle} y="${value < 0 ? 104 + height : 86 - height}">${shown(value)}</text>`);
    parts.push(`<text ${middle} y="${value < 0 ? 84 : 106}">${labels[i]}</text>`);
  });
  return parts.join("");
}

addEventListener("DOMContentLoaded", () => {
  document.addEventListener("input", () => draw());
  get("language").onclick = () => show_language(say("zh", "en"));
  show_language(document.documentElement.lang);
});
