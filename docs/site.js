// A link to a line, or to a tag's note, opens the folded part that it is in.
function openTarget() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target && target.closest("details:not([open])");
  if (folded) {
    folded.open = true;
    target.scrollIntoView();
  }
}
// Code that is copied over several notes has no empty lines where the notes are.
document.addEventListener("copy", (event) => {
  const range = getSelection().rangeCount && getSelection().getRangeAt(0);
  const common = range && range.commonAncestorContainer;
  if (!common || !common.closest || !common.closest(".annotated")) return;
  const lines = [...range.cloneContents().querySelectorAll(".line")];
  if (lines.length === 0) return;
  event.clipboardData.setData("text/plain", lines.map((line) => line.textContent).join(""));
  event.preventDefault();
});

addEventListener("hashchange", openTarget);
openTarget();
