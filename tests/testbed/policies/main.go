// Command policies compiles each expression of the admission policies in files, by the code of an API server, with what one of another
// version knows of functions; anything that is not compiled goes to stderr.
//
//	policies VERSION FILE...          prints how many policies and expressions there are
//
// What an API server takes anew is what the version before it knows, so that it can be rolled back to that. The compiler itself is
// of the version in go.mod, whatever is asked for.
package main

import (
	"bytes"
	"fmt"
	"os"

	"github.com/google/cel-go/cel"
	"k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/version"
	plugincel "k8s.io/apiserver/pkg/admission/plugin/cel"
	"k8s.io/apiserver/pkg/admission/plugin/policy/mutating/patch"
	"k8s.io/apiserver/pkg/cel/environment"
	"sigs.k8s.io/yaml"
)

// An expression, and what it may give.
type expression struct {
	name, text string
	types      []*cel.Type
}

func (e expression) GetName() string          { return e.name }
func (e expression) GetExpression() string    { return e.text }
func (e expression) ReturnTypes() []*cel.Type { return e.types }

type check struct {
	environment *environment.EnvSet
	policies    int
	expressions int
	failed      bool
}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: policies VERSION FILE...")
		os.Exit(2)
	}
	asked, err := version.ParseMajorMinor(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	known := asked.SubtractMinor(1)
	check := check{environment: environment.MustBaseEnvSet(known)}
	for _, path := range os.Args[2:] {
		if err := check.file(path); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", path, err)
			os.Exit(1)
		}
	}
	if check.failed {
		os.Exit(1)
	}
	fmt.Printf("%d policies, %d expressions\n", check.policies, check.expressions)
}

func (c *check) file(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for _, object := range bytes.Split(raw, []byte("\n---\n")) {
		var of metav1.TypeMeta
		if err := yaml.Unmarshal(object, &of); err != nil {
			return err
		}
		switch of.Kind {
		case "ValidatingAdmissionPolicy":
			var policy v1.ValidatingAdmissionPolicy
			if err := yaml.UnmarshalStrict(object, &policy); err != nil {
				return err
			}
			err = c.validating(&policy)
		// v1beta1 has the same fields.
		case "MutatingAdmissionPolicy":
			var policy v1.MutatingAdmissionPolicy
			if err := yaml.UnmarshalStrict(object, &policy); err != nil {
				return err
			}
			err = c.mutating(&policy)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// What an API server's own validation and its admission plug-in declare for each expression (validatingadmissionpolicy's compilePolicy).
func (c *check) validating(policy *v1.ValidatingAdmissionPolicy) error {
	spec := policy.Spec
	compiler, options, err := c.begin(policy.Name, spec.ParamKind, spec.MatchConditions, spec.Variables)
	if err != nil {
		return err
	}
	if len(spec.Validations) == 0 || len(spec.AuditAnnotations) > 0 {
		return fmt.Errorf("%s: no validations, or audit annotations, which nobody reads here", policy.Name)
	}
	withoutAuthorizer := options
	withoutAuthorizer.HasAuthorizer = false
	for i, validation := range spec.Validations {
		name := fmt.Sprintf("%s: validation %d", policy.Name, i)
		c.compile(compiler, expression{name, validation.Expression, []*cel.Type{cel.BoolType}}, options)
		if validation.MessageExpression != "" {
			c.compile(compiler, expression{name + "'s message", validation.MessageExpression, []*cel.Type{cel.StringType}}, withoutAuthorizer)
		}
	}
	return nil
}

func (c *check) mutating(policy *v1.MutatingAdmissionPolicy) error {
	spec := policy.Spec
	compiler, options, err := c.begin(policy.Name, spec.ParamKind, spec.MatchConditions, spec.Variables)
	if err != nil {
		return err
	}
	options.HasPatchTypes = true
	for i, mutation := range spec.Mutations {
		name := fmt.Sprintf("%s: mutation %d", policy.Name, i)
		switch {
		case mutation.JSONPatch != nil:
			accessor := &patch.JSONPatchCondition{Expression: mutation.JSONPatch.Expression}
			c.compile(compiler, expression{name, accessor.Expression, accessor.ReturnTypes()}, options)
		case mutation.ApplyConfiguration != nil:
			accessor := &patch.ApplyConfigurationCondition{Expression: mutation.ApplyConfiguration.Expression}
			c.compile(compiler, expression{name, accessor.Expression, accessor.ReturnTypes()}, options)
		}
	}
	if len(spec.Mutations) == 0 {
		return fmt.Errorf("%s: no mutations", policy.Name)
	}
	return nil
}

// Conditions, which know no variables, and those.
func (c *check) begin(policy string, params *v1.ParamKind, conditions []v1.MatchCondition, variables []v1.Variable) (*plugincel.CompositedCompiler, plugincel.OptionalVariableDeclarations, error) {
	c.policies++
	options := plugincel.OptionalVariableDeclarations{HasParams: params != nil, HasAuthorizer: true}
	compiler, err := plugincel.NewCompositedCompiler(c.environment)
	if err != nil {
		return nil, options, err
	}
	plain := plugincel.NewCompiler(c.environment)
	for _, condition := range conditions {
		name := policy + ": condition " + condition.Name
		c.compile(plain, expression{name, condition.Expression, []*cel.Type{cel.BoolType}}, options)
	}
	for _, variable := range variables {
		result := compiler.CompileAndStoreVariable(expression{variable.Name, variable.Expression, []*cel.Type{cel.AnyType, cel.DynType}}, options, environment.NewExpressions)
		c.count(policy+": variable "+variable.Name, result)
	}
	return compiler, options, nil
}

func (c *check) compile(compiler plugincel.Compiler, what expression, options plugincel.OptionalVariableDeclarations) {
	c.count(what.name, compiler.CompileCELExpression(what, options, environment.NewExpressions))
}

func (c *check) count(name string, result plugincel.CompilationResult) {
	c.expressions++
	if result.Error != nil {
		c.failed = true
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, result.Error)
	}
}
