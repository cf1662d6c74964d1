// Keys press the buttons of the page. A key that is held down, or that is meant for a text, presses none.
const KEYS = {
  ArrowLeft: "first", ArrowRight: "second", t: "tie", b: "both-bad", s: "skip", u: "undo",
}
document.addEventListener("keydown", (event) => {
  const isText = event.target.closest("textarea, input:not([type=radio])")
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || isText) return
  const button = document.getElementById(`vote-${KEYS[event.key] || KEYS[event.key.toLowerCase()]}`)
  if (!button || button.offsetParent === null) return
  event.preventDefault()
  event.stopPropagation()
  button.click()
}, true)
// The voter's name stays in the address, so that a reload goes on where the voter was.
window.keepVoter = (voter) => {
  if (voter) history.replaceState(null, "", `?voter=${encodeURIComponent(voter)}`)
  document.activeElement?.blur()
}
window.showTop = () => { scrollTo(0, 0); document.activeElement?.blur() }
