package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/throughline-mqtt/throughline/rules"
)

// maxEvalLine bounds one request line; past it the answer is an error and the rest of the line is skipped.
const maxEvalLine = 16 << 20

// runEval is the rule language without a broker: one JSON answer for each JSON line on stdin.
func runEval(ctx context.Context, c *cli, args []string) int {
	fs := c.flags("eval")
	if code, done := c.parse(fs, args); done {
		return code
	}
	if fs.NArg() > 0 {
		return c.misuse("eval: unexpected argument %q", fs.Arg(0))
	}
	in := bufio.NewReaderSize(c.stdin, 64<<10)
	out := bufio.NewWriter(c.stdout)
	for ctx.Err() == nil {
		line, err := readLine(in, maxEvalLine)
		if len(line) > 0 || errors.Is(err, errLineTooLong) {
			var answer []byte
			if errors.Is(err, errLineTooLong) {
				answer, _ = json.Marshal(map[string]string{"error": "request", "message": fmt.Sprintf("line longer than %d bytes", maxEvalLine)})
			} else {
				answer = rules.Eval(line, nil)
			}
			_, _ = out.Write(append(answer, '\n')) // the writer keeps the error for Flush
			if in.Buffered() == 0 {
				if err := out.Flush(); err != nil {
					return c.fail(fmt.Errorf("write answer: %w", err), "")
				}
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			if err := out.Flush(); err != nil {
				return c.fail(fmt.Errorf("write answer: %w", err), "")
			}
			return exitOK
		case err != nil && !errors.Is(err, errLineTooLong):
			return c.fail(fmt.Errorf("read stdin: %w", err), "")
		}
	}
	return exitProblem
}

var errLineTooLong = errors.New("line too long")

// readLine reads to the next line feed, and leaves it out. It skips what is longer than most.
func readLine(r *bufio.Reader, most int) ([]byte, error) {
	var line []byte
	tooLong := false
	for {
		part, err := r.ReadSlice('\n')
		if !tooLong {
			line = append(line, part...)
			if len(line) > most+1 {
				line, tooLong = nil, true
			}
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if tooLong && (err == nil || errors.Is(err, io.EOF)) {
			return nil, errLineTooLong
		}
		if n := len(line); n > 0 && line[n-1] == '\n' {
			line = line[:n-1]
		}
		return line, err
	}
}
