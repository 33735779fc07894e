package rules_test

import (
	"testing"

	"github.com/throughline-mqtt/throughline/rules"
)

// FuzzFunctions: whatever the arguments, a function answers or fails as a rule
// does, never makes more than it may, and takes a constant as it takes a variable.
func FuzzFunctions(f *testing.F) {
	for i := range rules.FunctionNames() {
		f.Add(uint(i), []byte("\x02{}\x00\x08\x01\x08\x02\x08\x03"))
		f.Add(uint(i), []byte("\x05\xff\xfea\xc3\xa9\x01\x0f\x04\xffab\xc3\x03\x02\x0f\x01,"))
		f.Add(uint(i), []byte("\x00\x02\x0b\x06a,b;%~\xff\x03\x7f\x0b\x02ab\xff\x0b\x03xyz\xff"))
		f.Add(uint(i), []byte("\x00\x01\x0d\x03\x03\x01\x0f\x01a\x01\x0d\x02\x03\x01\x03\x02\x03\x05"))
		f.Add(uint(i), []byte("\x00\x00\x06\xff\xff\xff\xff\xff\xff\xff\x7f\xff\x06\x00\x00\x00\x00\x00\x00\x00\x80\xff\x07\xff\xff\xff\xff\xff\xff\xef\x7f"))
	}
	f.Fuzz(func(t *testing.T, i uint, program []byte) {
		if call, wrong := rules.CheckCall(i, program); wrong != "" {
			t.Errorf("%s: %s", call, wrong)
		}
	})
}
