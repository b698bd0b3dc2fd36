package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"
)

// progressFlag is how a command shows how far it is: -p as qemu-img has it, and what programs can read.
type progressFlag struct {
	on   bool
	json bool
	fd   int // where JSON goes
	// apart: standard output is for what the command says, so that progress goes to standard error.
	apart bool
}

// addProgress adds -p.
func addProgress(f *pflag.FlagSet, p *progressFlag) { addProgressAs(f, p, "p") }

// addOwnProgress adds --progress, to a command that has no -p in qemu-img.
func addOwnProgress(f *pflag.FlagSet, p *progressFlag) { addProgressAs(f, p, "") }

func addProgressAs(f *pflag.FlagSet, p *progressFlag, short string) {
	f.VarPF(p, "progress", short, "show how far it is; `json` or json:FD for programs, on standard error or a file descriptor").NoOptDefVal = "on"
}

// String implements pflag.Value.
func (p *progressFlag) String() string { return "" }

// Type implements pflag.Value.
func (p *progressFlag) Type() string { return "format" }

// Set implements pflag.Value.
func (p *progressFlag) Set(text string) error {
	rest, isJSON := strings.CutPrefix(text, "json")
	switch {
	case text == "on", text == "true":
		p.on = true
		return nil
	case text == "off", text == "false":
		p.on = false
		return nil
	case isJSON && rest == "":
		p.on, p.json, p.fd = true, true, 2
		return nil
	}
	fd, ok := strings.CutPrefix(rest, ":")
	n, err := strconv.Atoi(fd)
	if !isJSON || !ok || err != nil || n < 0 {
		return fmt.Errorf("progress is shown as on, off, json or json:FD, not as %q", text)
	}
	p.on, p.json, p.fd = true, true, n
	return nil
}

// progressStyle is how progress is shown.
type progressStyle uint8

const (
	progressHidden   progressStyle = iota // but for those who ask by a signal
	progressPercent                       // as qemu-img -p does
	progressTerminal                      // to somebody who looks on
	progressJSON
)

// progress shows how far a command is.
type progress struct {
	style    progressStyle
	out, err io.Writer
	file     *os.File // that out is, if it is one of the user's own
	name     string   // of the command
	ignore   func()   // stops listening for signals

	mu          sync.Mutex
	began       time.Time
	percent     float64 // as last shown
	done, total int64   // as last told
	ended       bool
}

// startProgress begins to show the progress of a command. Whether it shows anything or not, a signal (SIGUSR1, or SIGINFO
// where there is one) has it tell once, on standard error. end or newline must be called.
func (a *app) startProgress(command string, f progressFlag, quiet bool) *progress {
	p := &progress{out: a.out, err: a.err, name: command, began: time.Now()}
	if f.apart {
		p.out = a.err
	}
	switch {
	case !f.on, quiet && !f.json:
	case f.json:
		p.style = progressJSON
		switch f.fd {
		case 1:
			p.out = a.out
		case 2:
			p.out = a.err
		default:
			p.file = os.NewFile(uintptr(f.fd), "progress")
			p.out = p.file
		}
	case a.name == program && isTerminal(p.out):
		p.style = progressTerminal
	default:
		p.style = progressPercent
	}
	p.show(false)
	p.ignore = onInfoSignal(p.tell)
	return p
}

// show shows how far it is; final, that the command has succeeded.
func (p *progress) show(final bool) {
	p.percent = p.now()
	switch p.style {
	case progressPercent:
		fmt.Fprintf(p.out, "    (%.2f/100%%)\r", p.percent)
	case progressTerminal:
		p.showTerminal()
	case progressJSON:
		p.showJSON(final)
	}
}

// set is told of done of total. It may be called from any goroutine.
func (p *progress) set(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	back := done < p.done
	p.done, p.total = done, total
	if percent := p.now(); percent-p.percent >= 1 || percent < p.percent && back {
		p.show(false)
	}
}

// now is how far it is, in percent.
func (p *progress) now() float64 { return 100 * float64(p.done) / float64(max(p.total, 1)) }

// tell tells once how far it is, as qemu-img does when it gets the signal.
func (p *progress) tell() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended {
		fmt.Fprintf(p.err, "    (%.2f/100%%)\n", p.now())
	}
}

// progressLine is one line of --progress=json.
type progressLine struct {
	Command  string   `json:"command"`
	Done     int64    `json:"done"`
	Total    int64    `json:"total"`
	Percent  float64  `json:"percent"`
	Seconds  float64  `json:"seconds"`                // since the beginning
	Rate     float64  `json:"rate"`                   // of what done counts, in a second
	Left     *float64 `json:"seconds-left,omitempty"` // if that can be guessed
	Finished bool     `json:"finished,omitempty"`     // the command has succeeded
}

func (p *progress) showJSON(final bool) {
	line := progressLine{Command: p.name, Done: p.done, Total: p.total, Percent: p.percent, Finished: final}
	line.Seconds = time.Since(p.began).Seconds()
	line.Rate = float64(p.done) / max(line.Seconds, 1e-9)
	if left, ok := p.left(line.Seconds); ok {
		line.Left = &left
	}
	if b, err := json.Marshal(line); err == nil {
		fmt.Fprintf(p.out, "%s\n", b)
	}
}

// left guesses how many seconds are left after so many.
func (p *progress) left(seconds float64) (float64, bool) {
	if p.done <= 0 || p.total <= 0 {
		return 0, false
	}
	return seconds / float64(p.done) * float64(max(p.total-p.done, 0)), true
}

// showTerminal shows rate and time left to somebody who looks on.
func (p *progress) showTerminal() {
	seconds := time.Since(p.began).Seconds()
	text := fmt.Sprintf("%5.1f%%", p.percent)
	if p.total > 1<<20 && seconds > 0.2 { // bytes
		text += fmt.Sprintf("  %s of %s, %s/s", humanSize(uint64(p.done)), humanSize(uint64(p.total)), humanSize(uint64(float64(p.done)/seconds)))
	}
	if left, ok := p.left(seconds); ok && p.done < p.total && seconds > 0.2 {
		text += fmt.Sprintf(", %s left", time.Duration(left*float64(time.Second)).Round(time.Second))
	}
	fmt.Fprintf(p.out, "\r%s\x1b[K", text)
}

// full shows that all is done, if that has not been shown.
func (p *progress) full() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = max(p.total, 1)
	p.total = p.done
	if p.percent != 100 || p.style == progressJSON {
		p.show(true)
	}
}

// end shows that the command is at its end, and ends the line.
func (p *progress) end() {
	p.mu.Lock()
	p.total = max(p.total, 1)
	p.done = p.total
	p.show(true)
	p.mu.Unlock()
	p.newline()
}

// newline ends the line on which progress was shown, and shows no more.
func (p *progress) newline() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	p.ended = true
	p.ignore()
	if p.style == progressPercent || p.style == progressTerminal {
		fmt.Fprintln(p.out)
	}
	if p.file != nil {
		_ = p.file.Close() // nobody waits for what could not be told
	}
}
